"""Rows that lack modalities on the cuda backend's kernels: every pattern, in both directions."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import Case, poison  # noqa: F401 - a fixture

from deqfuse import Anderson, Implicit, Neumann, Outcome
from deqfuse.backends import cuda, cuda_native, presence, reference
from deqfuse.backends.backend import Backend
from deqfuse.backends.maps import VARIANTS
from deqfuse.backends.problem import SolvedLayer
from deqfuse.triton_kernels.launch import Launch, intercept

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poison", "no_library")]

N, DIM = 4, 8
PATTERNS = list(itertools.product((False, True), repeat=N))  # the first row has nothing
GATHERING = dataclasses.replace(
    cuda.BACKEND, solve_present=None, adjoint_present=None, penalty_present=None
)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_native, "load_error", lambda: "not in this test")


class Absences:
    """A layer of contractions, and rows with every pattern, in which everything absent is NaN."""

    def __init__(self, variant: str, dtype: str = "f64", mask: bool = False) -> None:
        torch.manual_seed(0)
        self.case = case = Case(rows=len(PATTERNS), dim=DIM, n=N, dtype=dtype, mask=mask)
        cells, fuse = case.cells(), case.fuse()
        for i in range(0, len(cells), 10):
            cells[i + 2] *= 0.02
            cells[i + 8] *= 0.1 if variant == "released" else 1.0
        fuse = [0.02 * t if t.dim() == 2 else t for t in fuse]
        bias = [torch.rand(1).to(fuse[0])] if VARIANTS[variant].bias else []
        self.params = [*cells, *fuse, torch.rand(N).to(fuse[0]), *bias]
        self.present = torch.tensor(PATTERNS).T[..., None]
        self.xs, self.start = self._with_holes(case.draw(N)), self._with_holes(case.draw(N))
        self.start_fuse = torch.where(self.present.any(0), case.draw(), torch.nan)
        self.g, self.g_cells = case.draw(stored=False), case.draw(N, stored=False)
        self.drop, self.equations = case.drop(), (case.groups, VARIANTS[variant])

    def _with_holes(self, t: Tensor) -> list[Tensor]:
        return [torch.where(here, x, torch.nan) for x, here in zip(t, self.present, strict=True)]

    def solve(self, backend: Backend, solver: Anderson, warm: bool = False) -> SolvedLayer:
        z0 = (self.start_fuse, torch.stack(self.start)) if warm else (None, None)
        launch = presence.whole(backend).solve
        return SolvedLayer(
            *launch(self.xs, self.params, self.drop, *z0, self.present, *self.equations, solver)
        )

    def adjoint(self, backend: Backend, states: Tensor, option: object = None):
        option = option or Implicit(tol=1e-10, max_iter=50)
        launch = presence.whole(backend).adjoint
        operands = self.xs, self.params, self.drop, self.present
        return launch(self.g, self.g_cells, states, *operands, *self.equations, option, True)

    def penalty(self, backend: Backend, probes: Tensor, states: Tensor, want: bool = True):
        operands = self.xs, self.params, self.drop, self.present
        return presence.penalty_layer(backend, probes, states, *operands, *self.equations, want)


def ended(solved: SolvedLayer, present: Tensor) -> None:
    """What is absent has not been solved; the row without anything is empty; the rest converged."""
    here = present[..., 0]
    assert (solved.outcome[:-1] == torch.where(here, 0, int(Outcome.ABSENT))).all()
    some = here.any(0)
    assert (solved.outcome[-1] == torch.where(some, 0, int(Outcome.EMPTY))).all()
    assert torch.equal(solved.nfe > 0, torch.cat([here, some[None]]))
    assert (solved.states[:-1][~here] == 0).all()
    assert (solved.residual[:-1][~here] == 0).all()
    for t in (solved.z[~some], solved.states[-1][~some], solved.residual[-1][~some]):
        assert t.isnan().all()


@pytest.mark.parametrize(("variant", "mask"), [("paper", False), ("released", True)])
def test_every_pattern_is_that_of_the_reference(variant: str, mask: bool) -> None:
    """Which is that of the sub-layers: tests/layer/test_presence.py."""
    rows, found = Absences(variant, mask=mask), []
    here = rows.present[..., 0]
    for backend in (cuda.BACKEND, reference.BACKEND):
        solved = rows.solve(backend, Anderson(tol=1e-10, max_iter=50))
        ended(solved, rows.present)
        dx, grads, statistics = rows.adjoint(backend, solved.states.contiguous())
        assert (statistics.outcome == Outcome.CONVERGED).all()
        assert (statistics.nfe[:-1][~here] == 0).all()
        found.append([solved.states, solved.z, *dx, *grads])
        for own, d in zip(here, dx, strict=True):
            assert (d[~own] == 0).all()
    for given, expected in zip(*found, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-8, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize(
    ("variant", "warm", "trace"),
    [("paper", True, False), ("released", False, False), ("paper", True, True)],
)
def test_a_row_has_the_bits_of_the_rows_that_have_as_much(
    variant: str, warm: bool, trace: bool
) -> None:
    """Of solves that are given the rows of each cell, and of each number of modalities, alone."""
    rows, solver = Absences(variant, "f32", mask=True), Anderson(tol=1e-5, trace=trace)
    given, expected = (rows.solve(backend, solver, warm) for backend in (cuda.BACKEND, GATHERING))
    ended(given, rows.present)
    for mine, wanted in zip(given[:6], expected[:6], strict=True):
        assert mine.shape == wanted.shape
        assert torch.equal(mine.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_statistics_of_what_is_absent_say_that_nothing_was_done() -> None:
    """Where a budget is spent whatever the cotangent is. States as a solve leaves them."""
    rows, option = Absences("paper"), Neumann(2)
    cells = torch.where(rows.present, rows.case.draw(N), 0.0)
    fused = torch.where(rows.present.any(0), rows.case.draw(), torch.nan)
    states = torch.cat([cells, fused[None]])
    found = [rows.adjoint(backend, states, option) for backend in (cuda.BACKEND, GATHERING)]
    (dx, grads, given), (dx_wanted, grads_wanted, expected) = found
    for mine, wanted in zip(given[:3], expected[:3], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True)
    for mine, wanted in zip([*dx, *grads], [*dx_wanted, *grads_wanted], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("variant", "mask"), [("paper", False), ("released-mmimdb", True)])
def test_the_penalty_is_that_of_the_reference(variant: str, mask: bool) -> None:
    rows = Absences(variant, mask=mask)
    states = rows.solve(reference.BACKEND, Anderson(tol=1e-10)).states.contiguous()
    probes = rows.case.draw(2, N + 1)
    found = [rows.penalty(b, probes, states) for b in (cuda.BACKEND, reference.BACKEND)]
    (value, dx, grads), (wanted, dx_wanted, grads_wanted) = found
    there = torch.cat([rows.present, rows.present.any(0)[None]])[..., 0]
    assert torch.equal(value > 0, there)
    pairs = zip([value, *dx, *grads], [wanted, *dx_wanted, *grads_wanted], strict=True)
    for mine, expected in pairs:
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-8)
    only_value, _, none = rows.penalty(cuda.BACKEND, probes, states, want=False)
    assert torch.equal(only_value, value)
    assert none == []


class Asking(TorchDispatchMode):
    """Fails where the host would wait for a number of the device; notes all other operations."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.strip("_").startswith(tuple(w.strip("_") for w in self.WAITING)), name
        self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trace", [False, True], ids=["one launch", "steps"])
def test_nobody_asks_the_device_what_is_present(
    trace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches are noted, not run; the adjoint is the library's, by its host policy."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(presence, "_complete", lambda present: present is None)  # as on a device
    monkeypatch.setattr(cuda_native, "device_error", lambda index: None)
    rows, solver = Absences("released", "f32", mask=True), Anderson(max_iter=2, trace=trace)
    states, probes = rows.case.draw(N + 1, stored=False), rows.case.draw(2, N + 1, stored=False)
    calls: list[Launch] = []
    with intercept(calls.append), Asking() as asked:
        rows.solve(cuda.BACKEND, solver)
        rows.adjoint(cuda.BACKEND, states)
        rows.penalty(cuda.BACKEND, probes, states)
    names = [call.name for call in calls]
    whole, penalties = names[:-4], names[-4:]
    assert penalties[0] == penalties[1] == "_residual_cell_penalty_kernel"
    assert penalties[2] == penalties[3] == "_purify_combine_penalty_kernel"
    if not trace:
        assert whole == ["_solve_cells_kernel", "_solve_fuse_kernel"]
        assert asked.names[: asked.names.index("sum")].count("where") == 0
    with pytest.raises(AssertionError, match="nonzero"), intercept(calls.append), Asking():
        rows.solve(GATHERING, solver)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_mask_is_looked_at_where_nothing_waits_for_it(device: str) -> None:
    """On the CPU only: a mask without absences there is none."""
    complete = torch.ones(N, 3, 1, dtype=torch.bool, device=device)
    assert presence._complete(complete) is (device == "cpu")
    assert presence._complete(None)
