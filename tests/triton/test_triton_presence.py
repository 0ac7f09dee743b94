"""Rows that lack modalities on the cuda backend's kernels: forward and adjoint of every pattern."""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_cases import Case

from deqfuse import Anderson, Implicit, Outcome
from deqfuse.backends import cuda, cuda_native, presence, reference
from deqfuse.backends.maps import VARIANTS

N, DIM = 4, 8
PATTERNS = [p for p in itertools.product((False, True), repeat=N) if any(p)]


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_native, "load_error", lambda: "not in this test")


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_every_pattern_is_that_of_the_reference(variant: str) -> None:
    """Which is that of the sub-layers: tests/layer/test_presence.py."""
    torch.manual_seed(0)
    case = Case(rows=len(PATTERNS), dim=DIM, n=N)
    cells, fuse = case.cells(), case.fuse()
    for i in range(0, len(cells), 10):  # contractions, so that there is one answer
        cells[i + 2] *= 0.02
        cells[i + 8] *= 0.1 if variant == "released" else 1.0
    fuse = [0.02 * t if t.dim() == 2 else t for t in fuse]
    params = [*cells, *fuse, torch.rand(N, dtype=torch.float64)]
    params += [torch.rand(1, dtype=torch.float64)] if VARIANTS[variant].bias else []
    present = torch.tensor(PATTERNS).T[..., None]
    xs = [
        torch.where(here, x, torch.nan) for x, here in zip(case.draw(N), present, strict=True)
    ]  # fmt: skip
    g, g_cells = case.draw(), case.draw(N)
    solver = Anderson(tol=1e-10, max_iter=50)
    how, found = (case.groups, VARIANTS[variant]), []
    for backend in (cuda.BACKEND, reference.BACKEND):
        launch = presence.whole(backend)
        solved = launch.solve(xs, params, None, None, None, present, *how, solver)
        states = solved.states.contiguous()
        adjoint = (*how, Implicit(tol=1e-10, max_iter=50), True)
        dx, grads, statistics = launch.adjoint(
            g, g_cells, states, xs, params, None, present, *adjoint
        )
        assert (solved.outcome[-1] == Outcome.CONVERGED).all()
        assert (statistics.outcome == Outcome.CONVERGED).all()
        found.append([solved.states, solved.z, *dx, *grads])
        for here, d in zip(present[..., 0], dx, strict=True):
            assert (d[~here] == 0).all()
    for given, expected in zip(*found, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-8, atol=1e-8)
