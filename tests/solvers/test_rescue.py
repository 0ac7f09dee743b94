"""Rows that Anderson leaves, solved by continuation; and the adjoints of such rows."""

from __future__ import annotations

import dataclasses

import cpu_cases  # noqa: F401 - skips where the compiled backend is missing
import pytest
import torch
from rescue_cases import BACKENDS, Hard, left
from torch._subclasses.fake_tensor import FakeTensorMode

from deqfuse import Outcome
from deqfuse.backends import cpu_native
from deqfuse.backends.problem import Solved
from deqfuse.solvers import continuation
from deqfuse.solvers.derivatives import columns_of, jvp_of

KINDS = ("cells", "fuse")
CASES = {
    "paper": Hard(),
    "released": Hard(variant="released"),
    "released-mmimdb": Hard(variant="released-mmimdb", scale=1.0),
    "mask": Hard(masked=True),
    "N=1": Hard(n=1),
    "N=6": Hard(n=6, rows=32),
    "odd d": Hard(dim=33, groups=3),
    "pairs": Hard(groups=8, rows=32),
    "one group": Hard(groups=1),
    "d=64": Hard(dim=64),
    "wide": Hard(dim=150, groups=2, rows=12),
}


def rows_of(found: Solved) -> tuple[torch.Tensor, ...]:
    return found.z, found.residual, found.nfe, found.outcome


def assert_same(a: Solved, b: Solved) -> None:
    for left_, right in zip(rows_of(a), rows_of(b), strict=True):
        assert torch.equal(left_, right)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_are_solved(case: Hard, kind: str) -> None:
    block = case.blocks()[kind]
    found = block.found()
    rescued = block.rescued()
    rows = left(found)
    solved = rows & ~left(rescued)
    # The path aims at a tenth of the tolerance; naive sums differ by rounding, far below that.
    assert (block.residual(rescued.z)[solved] <= 0.2 * case.tol).all()
    assert (rescued.residual[solved] <= case.tol).all()
    # Norms over pairs of features are signs nearly everywhere: there, some rows stay unsolved.
    allowed = 0.3 * rows.sum() if case.dim == 2 * case.groups else 0
    assert left(rescued).sum() <= allowed
    assert (rescued.nfe[rows] > found.nfe[rows]).all()
    for before, after in zip(rows_of(found), rows_of(rescued), strict=True):
        assert torch.equal(before[~rows], after[~rows])


def test_there_is_something_to_rescue() -> None:
    for case in CASES.values():
        counts = {kind: int(left(block.found()).sum()) for kind, block in case.blocks().items()}
        assert sum(counts.values()) > 0, (case, counts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_form_solves_them_too(kind: str) -> None:
    block = dataclasses.replace(Hard(), rows=6).blocks()[kind]
    found = block.solved(BACKENDS["reference"], rescue=False)
    rescued = block.rescued(BACKENDS["reference"])
    rows = left(found)
    assert rows.any()
    assert not left(rescued).any()
    assert (block.residual(rescued.z) <= 0.2 * block.case.tol)[rows].all()
    assert (rescued.nfe[rows] > found.nfe[rows]).all()
    assert torch.equal(rescued.z[~rows], found.z[~rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_nothing_else(kind: str, dtype: torch.dtype) -> None:
    block = Hard(dtype=dtype, tol=1e-4).blocks()[kind]
    found = block.found()
    whole = block.rescued()
    assert left(found).sum() > 3
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same(whole, block.rescued())
    finally:
        torch.set_num_threads(before)
    for rows in (slice(5, 6), slice(7, 31)):
        alone = block.some_rows(rows).rescued()
        assert torch.equal(alone.z, whole.z[..., rows, :])
        assert torch.equal(alone.nfe, whole.nfe[..., rows])


@pytest.mark.parametrize("kind", KINDS)
def test_poisoned_rows_stay_as_they_are(kind: str) -> None:
    block = Hard().blocks()[kind]
    block.before[0][..., 3, 5] = torch.nan
    found = block.found()
    rescued = block.rescued()
    bad = found.outcome == int(Outcome.NON_FINITE)
    assert bad.any()
    assert (rescued.outcome[bad] == int(Outcome.NON_FINITE)).all()
    assert not rescued.z[bad].isfinite().all()
    assert not left(rescued)[~bad].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_work_is_bounded(backend: str) -> None:
    block = dataclasses.replace(Hard(), rows=8).blocks()["fuse"]
    found = block.found()
    assert left(found).any()
    spent = [
        int((block.rescued(BACKENDS[backend], most).nfe - found.nfe).max()) for most in (1, 3, 4000)
    ]
    assert spent[0] < spent[1] < spent[2]


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_judged_as_stored(kind: str) -> None:
    """A converged row's residual, recomputed naively, is at most three times the tolerance; where
    float32 has no number that good, the row says so."""
    block = Hard(dtype=torch.float32, tol=1e-5, rows=400).blocks()[kind]
    found = block.found()
    rescued = block.rescued()
    mended = left(found) & ~left(rescued)
    assert mended.sum() > 10
    assert (block.residual(rescued.z)[mended] <= 3 * block.case.tol).all()
    assert (block.residual(rescued.z.double())[mended] <= block.case.tol * (1 + 1e-6)).all()
    lost = left(rescued)
    assert (rescued.residual[lost] > block.case.tol).all()


@pytest.mark.parametrize("which", [-1, 48])
def test_rows_must_exist(which: int) -> None:
    block = Hard().blocks()["fuse"]
    x, cell_sum, params, mask = block.before
    with pytest.raises(RuntimeError, match=f"which: expected rows below 48, got {which}"):
        cpu_native.rescue_fuse(
            x, cell_sum, params, mask, *block.found()[:4], torch.tensor([which]), 3, 4, False,
            1e-6, 10,
        )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_fake_kernels_agree_in_shape(kind: str) -> None:
    block = Hard(rows=5).blocks()[kind]
    found, which = block.found(), torch.tensor([1, 3, 4])
    flags = (4, False) if kind == "cells" else (3, 4, False)
    operator = cpu_native.rescue_cells if kind == "cells" else cpu_native.rescue_fuse
    arguments = (*block.before, *found[:4], which, *flags, 1e-6, 9)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = operator(*arguments)
    for real, fake in zip(operator(*arguments), fakes, strict=True):
        assert real.shape == fake.shape
        assert real.dtype == fake.dtype


def test_a_curve_that_turns_back_at_kinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """z = 1.1 is reached at t = 0.45, where f turns steep: t falls to 0.05 until z = 1.15, and then
    rises to 1 at z = 4.375, the only zero. At both kinks the tangent turns by more than 90 degrees,
    so that the next one cannot be told by the last; and there is one start."""
    monkeypatch.setattr(continuation, "STARTS", 1)

    def f(z: torch.Tensor) -> torch.Tensor:
        return 1 + 0.2 * z + 50 * (z - 1.1).clamp(0, 0.05)

    best = torch.full((1, 1), torch.nan, dtype=torch.float64)  # no start for Newton's method
    zeros = continuation.find_zeros(f, columns_of(jvp_of(f)), best, [0], 1e-10, 1000)
    assert zeros.found.all()
    torch.testing.assert_close(zeros.z, torch.tensor([[4.375]], dtype=torch.float64))


def test_the_plain_form_gives_up() -> None:
    """Without Jacobians nothing is found, and the best iterate stays."""
    best = torch.zeros(3, 2, dtype=torch.float64)
    f = lambda z: torch.cos(4 * z + 1)  # noqa: E731
    made = 0

    def jacobian(z: torch.Tensor, rows: list[int]) -> torch.Tensor:
        nonlocal made
        made += len(rows)
        return columns_of(jvp_of(f))(z, rows)

    zeros = continuation.find_zeros(f, jacobian, best, [0, 2], 1e-9, 0)
    assert made == 0
    assert not zeros.found.any()
    assert torch.equal(zeros.z, best)
    assert (zeros.work > 0).tolist() == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_row_is_called_converged_that_is_not(dtype: torch.dtype) -> None:
    """10,000 random problems of each dtype, recomputed naively; and how many are solved."""
    seen = solved = 0
    seed = 0
    while seen < 10_000:
        seed += 1
        case = Hard(
            dim=(12, 16, 24, 40)[seed % 4],
            groups=(4, 2, 3, 8)[seed % 4],
            n=1 + seed % 6,
            rows=256,
            variant=("paper", "released", "released-mmimdb")[seed % 3],
            masked=seed % 5 == 0,
            scale=(0.3, 1.0, 3.0)[seed % 3],
            dtype=dtype,
            tol=1e-5,
            seed=seed,
        )
        for block in case.blocks().values():
            found = block.found()
            rescued = block.rescued()
            rows, mended = left(found), left(found) & ~left(rescued)
            assert (block.residual(rescued.z)[mended] <= 3e-5).all()
            seen, solved = seen + int(rows.sum()), solved + int(mended.sum())
    assert solved >= (0.999 if dtype == torch.float64 else 0.9) * seen, (solved, seen)
