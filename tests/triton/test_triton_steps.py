"""The step kernels against the equations: values, VJPs, launches; under Triton's interpreter."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from triton_cases import (
    Case,
    assert_as_good_as_torch,
    poison,  # noqa: F401 - a fixture
    stacked,
    tupled,
    upcast,
)

from deqfuse.backends import maps
from deqfuse.backends.linearization import CellLinearization, FuseLinearization
from deqfuse.backends.maps import VARIANTS
from deqfuse.backends.reference import compute_dtype
from deqfuse.triton_kernels import cell, cell_vjp, fuse, fuse_vjp, tiles
from deqfuse.triton_kernels.launch import counted

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poison")]

# (d, groups): padded groups, padded group counts, one group, one launch and several.
WHOLE = ((4, 2), (12, 3), (20, 5), (50, 2), (64, 1), (96, 4), (128, 4))
WIDE = ((300, 4), (192, 3), (160, 10))
# Groups wider than a tile of several; above 512 columns tiles are other ones (tiles.product_tile).
HUGE = [
    *(Case(rows=5, dim=d, groups=1, dtype="f32") for d in (512, 600, 1000, 1024)),
    Case(rows=9, dim=768, groups=1, dtype="f32", variant="released", mask=True),
    *(Case(rows=9, dim=1000, groups=2, dtype=t, n=1) for t in ("f32", "f64")),
    *(Case(rows=5, dim=300, groups=1, dtype=t) for t in ("bf16", "f16")),
    Case(rows=5, dim=1024, groups=1, dtype="bf16", n=1),
    Case(rows=9, dim=512, groups=1, dtype="f64"),
    *(Case(rows=r, dim=d, groups=1, dtype="f64", n=1) for r, d in ((5, 1000), (3, 1024))),
]
CELLS = [
    *(Case(rows=5, dim=d, groups=g, dtype=t) for (d, g), t in itertools.product(WHOLE, ("f64",))),
    *(Case(variant=v, dtype=t) for v in ("paper", "released") for t in ("f32", "bf16", "f16")),
    *(Case(rows=r, n=n) for r, n in ((1, 1), (16, 1), (33, 3))),
    *(
        Case(rows=5, dim=d, groups=g, variant=v, dtype=t)
        for (d, g), v, t in ((WIDE[0], "released", "f32"), (WIDE[1], "paper", "f64"))
    ),
    Case(rows=9, dim=520, groups=1, dtype="f32", n=1),
]
MORE = [
    Case(rows=r, dim=d, groups=g, variant=v, dtype=t)
    for r, (d, g), v, t in itertools.product(
        (5, 17), (*WHOLE, *WIDE, (500, 4), (768, 4)), ("paper", "released"), ("f64", "f32", "bf16")
    )
    if r * d <= 5000
]


def cell_operands(case):
    torch.manual_seed(case.dim)
    return case.draw(case.n, stored=False), case.draw(case.n), case.cells()


def run_cell(case):
    z, x, params = cell_operands(case)
    skip = case.variant != "paper"
    given = cell.residual_cell(z, x, cell.pack_cells(params), case.groups, skip)

    def reference(dtype):
        z_, x_, p = upcast((z, x, params), dtype)
        return [maps.residual_cell(z_, x_, stacked(p), case.groups, VARIANTS[case.variant])]

    assert given.dtype == compute_dtype(x.dtype)
    assert_as_good_as_torch([given], reference)


def run_cell_vjp(case):
    z, x, params = cell_operands(case)
    u, skip = case.draw(case.n, stored=False), case.variant != "paper"
    packed = cell.pack_cells(params)
    given = cell_vjp.residual_cell_vjp(u, z, x, packed, case.groups, skip)
    without = cell_vjp.residual_cell_vjp(u, z, x, packed, case.groups, skip, want_params=False)
    assert torch.equal(without.dz, given.dz)
    assert torch.equal(without.dx, given.dx)
    assert without[2:] == (None, None, None)

    def reference(dtype):
        u_, z_, x_, p = upcast((u, z, x, params), dtype)
        at = CellLinearization(z_, x_, stacked(p), case.groups, VARIANTS[case.variant])
        dx, dp = at.vjp_operands(u_, True)
        vectors = torch.stack([dp.linear1_bias, dp.linear2_bias, *dp[4:]], 1)
        return [at.vjp(u_), dx, dp.linear1_weight, dp.linear2_weight, vectors]

    assert_as_good_as_torch(given, reference)


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_residual_cell(case):
    run_cell(case)


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_residual_cell_vjp(case):
    run_cell_vjp(case)


FUSES = [
    *(Case(rows=5, dim=d, groups=g) for d, g in WHOLE),
    *(
        Case(variant=v, dtype=t, mask=m)
        for v, t, m in itertools.product(
            ("paper", "released-mmimdb"), ("f32", "bf16", "f16"), (False, True)
        )
    ),
    *(Case(rows=r, n=n) for r, n in ((1, 1), (16, 1), (33, 3))),
    Case(rows=5, dim=300, groups=4, dtype="f32", mask=True),
    Case(rows=5, dim=192, groups=3, variant="released-mmimdb"),
    Case(rows=9, dim=520, groups=1, dtype="f32", mask=True),
]


def fuse_operands(case):
    torch.manual_seed(case.dim)
    z, x, cell_sum = case.draw(stored=False), case.draw(), case.draw(stored=False)
    return z, x, cell_sum, case.fuse(), case.drop()


def run_fuse(case):
    z, x, cell_sum, params, mask = fuse_operands(case)
    last = case.variant == "released-mmimdb"
    constant = fuse.gate_constant(cell_sum, case.n, params, case.groups, z.dtype)
    given = fuse.purify_combine(z, x, constant, mask, case.n, params, case.groups, last)

    def reference(dtype):
        z_, x_, s, p, m = upcast((z, x, cell_sum, params, mask), dtype)
        c = maps.gate_constant(s, case.n, tupled(p))
        rest = (tupled(p), case.groups, VARIANTS[case.variant])
        return [c, maps.purify_combine(z_, x_, c, m, case.n, *rest)]

    assert_as_good_as_torch([constant, given], reference)


def run_fuse_vjp(case):
    z, x, cell_sum, params, mask = fuse_operands(case)
    u, last = case.draw(stored=False), case.variant == "released-mmimdb"
    operands = (u, z, x, cell_sum, mask, case.n, params, case.groups, last)
    given = fuse_vjp.purify_combine_vjp(*operands)
    without = fuse_vjp.purify_combine_vjp(*operands, want_params=False)
    assert all(torch.equal(a, b) for a, b in zip(without[:3], given[:3], strict=True))
    assert without.params is None

    def reference(dtype):
        u_, z_, x_, s, p, m = upcast((u, z, x, cell_sum, params, mask), dtype)
        at = FuseLinearization(
            z_, x_, s, m, case.n, tupled(p), case.groups, VARIANTS[case.variant]
        )  # fmt: skip
        dx, dsum, dp = at.vjp_operands(u_, True)
        return [at.vjp(u_), dx, dsum, *dp]

    assert_as_good_as_torch([*given[:3], *given.params], reference)


@pytest.mark.parametrize("case", FUSES, ids=str)
def test_purify_combine(case):
    run_fuse(case)


@pytest.mark.parametrize("case", FUSES, ids=str)
def test_purify_combine_vjp(case):
    run_fuse_vjp(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*MORE, *HUGE], ids=str)
def test_the_full_grid(case):
    run_cell(case)
    run_cell_vjp(case)
    if case.variant == "paper" or case.mask:
        run_fuse(case)
        run_fuse_vjp(case)


def test_products_whose_blocks_are_single_columns(monkeypatch):
    """As in float64 above 512 channels a group, where it takes long: among the slow ones."""
    for module in (cell, cell_vjp, fuse, fuse_vjp):
        name = "fuse_vjp_tile" if module is fuse_vjp else "step_tile"
        cut = getattr(tiles, name)
        monkeypatch.setattr(module, name, lambda *a, cut=cut, **k: replace(cut(*a, **k), inner=1))
    assert tiles.step_tile(520, 1, torch.float64).inner == 1
    case = Case(rows=5, dim=12, groups=1)
    run_cell(case)
    run_cell_vjp(case)
    run_fuse(case)
    run_fuse_vjp(case)


# ---- rows on their own ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "groups"), [(12, 3), (192, 3)], ids=["whole", "wide"])
def test_a_row_does_not_depend_on_its_neighbours(dim, groups):
    case = Case(rows=35, dim=dim, groups=groups, dtype="f32", n=1)
    z, x, params = cell_operands(case)
    packed = cell.pack_cells(params)
    together = cell.residual_cell(z, x, packed, groups, True)
    for rows in (slice(0, 1), slice(16, 34), slice(34, 35)):
        alone = cell.residual_cell(z[:, rows], x[:, rows], packed, groups, True)
        assert torch.equal(alone, together[:, rows])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("poison_value", [torch.nan, torch.inf], ids=str)
def test_a_poisoned_row_stays_poisoned_and_alone(poison_value):
    case = Case(rows=5, dtype="f32")
    z, x, params = cell_operands(case)
    packed = cell.pack_cells(params)
    clean = cell.residual_cell(z, x, packed, case.groups, False)
    z[1, 2, 7] = poison_value
    dirty = cell.residual_cell(z, x, packed, case.groups, False)
    assert dirty[1, 2].isnan().all(), "a relu that turns NaN into 0 would hide it"
    dirty[1, 2] = clean[1, 2]
    assert torch.equal(dirty, clean)


@pytest.mark.parametrize(("dim", "groups"), [(12, 3), (192, 3)], ids=["whole", "wide"])
def test_tiles_without_an_active_row_are_left_alone(dim, groups):
    case = Case(rows=70, dim=dim, groups=groups, dtype="f32")
    z, x, params = cell_operands(case)
    packed, active = cell.pack_cells(params), torch.zeros(case.n, case.rows, dtype=torch.bool)
    active[1, 69] = True
    out = torch.full_like(z, 7.0)
    cell.residual_cell(z, x, packed, groups, False, active=active, out=out)
    full = cell.residual_cell(z, x, packed, groups, False)
    assert (out[0] == 7).all()
    assert (out[1, :32] == 7).all()
    assert torch.equal(out[1, 69], full[1, 69])

    z, x, cell_sum, params, _ = fuse_operands(case)
    rest = (z, x, cell_sum, None, case.n, params, groups, False)
    out = torch.full_like(z, 7.0)
    fuse.purify_combine(*rest, active=active[1], out=out)
    assert (out[:32] == 7).all()
    assert torch.equal(out[69], fuse.purify_combine(*rest)[69])


# ---- launches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "groups", "steps", "vjps"), [(12, 3, 1, 1), (192, 3, 2, 4)], ids=["whole", "wide"]
)
def test_launches_of_a_step(dim, groups, steps, vjps):
    case = Case(rows=3, dim=dim, groups=groups, dtype="f32", n=3)
    z, x, params = cell_operands(case)
    packed = cell.pack_cells(params)
    with counted() as names:
        cell.residual_cell(z, x, packed, groups, False)
        cell_vjp.residual_cell_vjp(z, z, x, packed, groups, False)
    assert names == ["_residual_cell_kernel"] * steps + ["_residual_cell_vjp_kernel"] * vjps
    z, x, cell_sum, params, _ = fuse_operands(case)
    with counted() as names:
        constant = fuse.gate_constant(cell_sum, 3, params, groups, z.dtype)
        fuse.purify_combine(z, x, constant, None, 3, params, groups, False)
        fuse_vjp.purify_combine_vjp(z, z, x, cell_sum, None, 3, params, groups, False)
    assert names == [
        "_gate_constant_kernel",
        *["_purify_combine_kernel"] * steps,
        *["_purify_combine_vjp_kernel"] * vjps,
    ]


def test_no_rows_no_launch():
    case = Case(rows=0)
    z, x, params = cell_operands(case)
    with counted() as names:
        out = cell.residual_cell(z, x, cell.pack_cells(params), case.groups, False)
        gradients = cell_vjp.residual_cell_vjp(z, z, x, cell.pack_cells(params), case.groups, False)
    assert out.shape == z.shape
    assert (gradients.weight1 == 0).all()
    assert (gradients.vectors == 0).all()
    assert names == []
