"""The penalty kernels against the closed form in plain PyTorch; under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton_cases import (
    Case,
    assert_as_good_as_torch,
    poison,  # noqa: F401 - a fixture
    upcast,
)

from deqfuse.backends import cuda, penalty
from deqfuse.backends.maps import VARIANTS
from deqfuse.triton_kernels import cell_penalty, fuse_penalty, tiles
from deqfuse.triton_kernels.launch import counted

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poison")]

CELLS, FUSE = "_residual_cell_penalty_kernel", "_purify_combine_penalty_kernel"


def operands(case: Case, probes: int) -> list:
    """The penalty's arguments up to the dropout mask."""
    torch.manual_seed(case.dim)
    x, blocks = list(case.draw(case.n)), case.n + 1
    states, v = (case.draw(*shape, stored=False) for shape in ((blocks,), (probes, blocks)))
    params = [*case.cells(), *case.fuse(), (torch.rand(case.n) + 0.5).to(x[0])]
    if VARIANTS[case.variant].bias:
        params.append(torch.tensor([0.3]).to(x[0]))
    return [v, states, x, params, case.drop()]


def flat(answer: tuple[Tensor, list[Tensor], list[Tensor]]) -> list[Tensor]:
    value, dx, grads = answer
    return [value, *dx, *grads]


def run(case: Case, probes: int) -> None:
    given, rest = operands(case, probes), (case.groups, VARIANTS[case.variant])
    mine = cuda.BACKEND.penalty(*given, *rest, True)
    without = cuda.BACKEND.penalty(*given, *rest, False)
    assert all(map(torch.equal, flat(without), flat(mine)))
    assert without[2] == []

    def reference(dtype: torch.dtype) -> list[Tensor]:
        return flat(penalty.penalty_layer(*upcast(given, dtype), *rest, True))

    assert {t.dtype for t in flat(mine)} == {given[1].dtype}
    sums = -2 if VARIANTS[case.variant].bias else -1
    assert_as_good_as_torch(flat(mine)[:sums], lambda dtype: reference(dtype)[:sums])
    assert_sums(mine, given[2], reference(torch.float64), reference(torch.float32), sums)


def assert_sums(mine, x: list[Tensor], truth: list[Tensor], single: list[Tensor], sums: int):
    """Of the gradients of modality_weights and of the bias, sums over all that x_fuse gets.

    PyTorch may hit one number by luck, so its error says nothing. The terms' errors are those of
    x's gradients, and bounded as these are; the sum's is at most all of them together.
    """
    count, unit = len(x), torch.finfo(mine[0].dtype).eps
    terms = truth[1 : 1 + count]
    units = max((a - b).abs().max() for a, b in zip(single[1 : 1 + count], terms, strict=True))
    scale = max(t.abs().max() for t in terms)
    each = 8 * unit * (units / torch.finfo(torch.float32).eps + scale / 8)
    for a, b in zip(flat(mine)[sums:], truth[sums:], strict=True):
        assert (a - b).abs().max() <= each * max(sum(t.abs().sum() for t in x), x[0].numel())


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_and_probes(variant: str, probes: int) -> None:
    run(Case(rows=9, variant=variant, mask=variant != "paper"), probes)


@pytest.mark.parametrize(
    ("dim", "groups"), [(4, 2), (15, 5), (20, 1), (45, 3), (128, 4), (81, 9), (192, 3)]
)
def test_widths(dim: int, groups: int) -> None:
    """Padded groups and group counts, one group; the last two are launched stage by stage."""
    run(Case(rows=3, dim=dim, groups=groups, n=1, variant="released"), 2)


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (16, 1), (33, 3)])
def test_rows_and_modalities(rows: int, n: int) -> None:
    """A row, a whole tile, and one row more than two tiles."""
    run(Case(rows=rows, n=n), 1)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("dim", "groups"), [(12, 3), (81, 9)], ids=["whole", "wide"])
def test_dtypes(dtype: str, dim: int, groups: int) -> None:
    run(Case(rows=5, dim=dim, groups=groups, dtype=dtype, variant="released-mmimdb", mask=True), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *(Case(rows=5, dim=d, groups=1, dtype="f32", n=1) for d in (520, 1000, 1024)),
        Case(rows=9, dim=768, groups=1, dtype="f32", variant="released", mask=True, n=1),
        Case(rows=5, dim=1000, groups=2, dtype="f64", variant="released-mmimdb", n=1),
        Case(rows=3, dim=1024, groups=1, dtype="bf16", n=1),
        Case(rows=40, dim=300, groups=4, dtype="f32", variant="released", mask=True),
    ],
    ids=str,
)
def test_wide_groups(case: Case) -> None:
    run(case, 2)


def test_products_whose_blocks_are_single_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in float64 above 512 channels a group."""
    for module, name in ((cell_penalty, "step_tile"), (fuse_penalty, "fuse_vjp_tile")):
        cut = getattr(tiles, name)
        monkeypatch.setattr(module, name, lambda *a, cut=cut, **k: replace(cut(*a, **k), inner=1))
    assert tiles.step_tile(520, 1, torch.float64).inner == 1
    run(Case(rows=5, groups=1), 2)


# ---- rows on their own ---------------------------------------------------------------------------


def rows_of(given: list, rows: slice) -> list:
    v, states, x, params, mask = given
    part = [v[:, :, rows], states[:, rows], [t[rows] for t in x], params]
    return [*part, None if mask is None else mask[rows]]


@pytest.mark.parametrize(("dim", "groups"), [(12, 3), (81, 9)], ids=["whole", "wide"])
def test_a_row_does_not_depend_on_its_neighbours(dim: int, groups: int) -> None:
    """Nor do slices, which are not contiguous, trouble it."""
    case = Case(rows=18, dim=dim, groups=groups, dtype="f32", n=1, variant="released", mask=True)
    given, rest = operands(case, 2), (groups, VARIANTS[case.variant], False)
    value, dx, _ = cuda.BACKEND.penalty(*given, *rest)
    for rows in (slice(0, 1), slice(15, 18)):
        alone, dx_alone, _ = cuda.BACKEND.penalty(*rows_of(given, rows), *rest)
        assert torch.equal(alone, value[:, rows])
        assert torch.equal(dx_alone[0], dx[0][rows])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("poison_value", [torch.nan, torch.inf], ids=str)
def test_a_poisoned_row_stays_poisoned_and_alone(poison_value: float) -> None:
    case = Case(rows=5, dtype="f32")
    given, rest = operands(case, 1), (case.groups, VARIANTS[case.variant], False)
    clean, dx_clean, _ = cuda.BACKEND.penalty(*given, *rest)
    given[1][1, 2, 7] = poison_value  # a state of the second cell, whose sum the gate has as well
    dirty, dx, _ = cuda.BACKEND.penalty(*given, *rest)
    assert dirty[1:, 2].isnan().all(), "a relu that turns NaN into 0 would hide it"
    assert dx[1][2].isnan().all()
    expected, dx_expected, _ = penalty.penalty_layer(*given, *rest)
    for mine, wanted, other in zip(
        [dirty.T, *dx], [expected.T, *dx_expected], [clean.T, *dx_clean], strict=True
    ):
        assert torch.equal(mine.isnan(), wanted.isnan())
        others = [0, 1, 3, 4]
        assert torch.equal(mine[others], other[others])


# ---- launches ------------------------------------------------------------------------------------


@contextmanager
def launches_are(expected: list[str]) -> Iterator[None]:
    with counted() as names:
        yield
    assert names == expected


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize(
    ("dim", "groups", "stages"), [(12, 3, (0, 1, 0)), (81, 9, (2, 5, 1))], ids=["whole", "wide"]
)
def test_launches(dim: int, groups: int, stages: tuple[int, int, int], probes: int) -> None:
    """One a probe and block kind, or five, and before and after the probes two and one."""
    case, (before, each, after) = Case(rows=2, dim=dim, groups=groups, n=1), stages
    given, rest = operands(case, probes), (groups, VARIANTS[case.variant])
    for want_params in (False, True):
        count = before + each * probes + after * want_params
        with launches_are([CELLS] * count + [FUSE] * count):
            cuda.BACKEND.penalty(*given, *rest, want_params)


def test_groups_that_no_step_takes_are_computed_in_plain_pytorch() -> None:
    case = Case(rows=1, dim=tiles.MAX_GROUP + 1, groups=1, n=1)
    given, rest = operands(case, 1), (1, VARIANTS[case.variant], True)
    with launches_are([]):
        mine = cuda.BACKEND.penalty(*given, *rest)
    assert all(map(torch.equal, flat(mine), flat(penalty.penalty_layer(*given, *rest))))


def test_no_rows_no_launch() -> None:
    case = Case(rows=0)
    with launches_are([]):
        value, dx, grads = cuda.BACKEND.penalty(
            *operands(case, 2), case.groups, VARIANTS[case.variant], True
        )
    assert value.shape == (case.n + 1, 0)
    assert [t.shape for t in dx] == [(0, case.dim)] * case.n
    assert all((t == 0).all() for t in grads)
