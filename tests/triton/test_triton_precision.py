"""What residual products of rounded operands can reach, emulated in PyTorch; no GPU, no Triton.

The interpreter computes products exactly whatever precision is asked for, so this is the proof
behind the tolerance below which the kernels leave TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rounding import bf16, tf32
from torch import Tensor

from deqfuse import Anderson, DEQFusion, Outcome
from deqfuse.backends import maps, reference
from deqfuse.backends.maps import PAPER
from deqfuse.triton_kernels import tiles

DOCS = Path(__file__).parents[2] / "docs/explanation/kernels-gpu.md"


def solve_rounded(
    round_: Callable[[Tensor], Tensor], solver: Anderson, monkeypatch: pytest.MonkeyPatch
) -> list[reference.Solved]:
    """Both solves of a layer at its default initialisation, every product's operands rounded."""
    torch.manual_seed(0)
    layer = DEQFusion(128, 3).requires_grad_(False)
    x = torch.randn(3, 256, 128)
    linear, addmm = maps.linear, torch.addmm
    with monkeypatch.context() as patch:
        patch.setattr(maps, "linear", lambda a, w, b: linear(round_(a), round_(w), b))
        patch.setattr(
            torch, "addmm", lambda c, a, w, **k: addmm(c, round_(a), round_(w.mT).mT, **k)
        )
        flat = [t for cell in layer.cells for t in cell.flat()]
        cells = reference.solve_cells(x, flat, None, 4, PAPER, solver)
        parameters = layer.combine.flat()
        fuse = reference.solve_fuse(
            x.sum(0), cells.z.sum(0), parameters, None, None, 3, 4, PAPER, solver
        )
    return [cells, fuse]


def test_tf32_reaches_the_tolerance_that_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = solve_rounded(lambda t: t, Anderson(tol=tiles.TF32_TOL, rescue=False), monkeypatch)
    rounded = solve_rounded(tf32, Anderson(tol=tiles.TF32_TOL, rescue=False), monkeypatch)
    for given, wanted in zip(rounded, exact, strict=True):
        assert (given.outcome == Outcome.CONVERGED).all()
        assert (given.nfe - wanted.nfe).abs().max() <= 4


@pytest.mark.parametrize(("round_", "reach"), [(tf32, 1e-6), (bf16, 1e-5)], ids=["tf32", "bf16"])
def test_rounded_operands_do_not_reach_float32s_residuals(
    round_: Callable[[Tensor], Tensor], reach: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map of rounded operands is a staircase: below its steps a solve only wanders."""
    solver = Anderson(tol=reach, rescue=False)
    exact, rounded = (solve_rounded(r, solver, monkeypatch) for r in (lambda t: t, round_))
    assert all((block.outcome == Outcome.CONVERGED).all() for block in exact)
    assert any((block.outcome != Outcome.CONVERGED).any() for block in rounded)


@pytest.mark.parametrize(
    ("name", "round_"), [("float32", lambda t: t), ("TF32", tf32), ("bfloat16", bf16)]
)
def test_the_docs_table_is_true(
    name: str, round_: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to what another machine's order of summation changes."""
    lines = DOCS.read_text().splitlines()
    row = next(line for line in lines if line.startswith(f"| {name} |"))
    *shares, best = (cell.strip() for cell in row.strip("| ").split("|")[1:])
    for tol, share in zip((1e-3, 1e-4, 1e-5, 1e-6), shares, strict=True):
        cells = solve_rounded(round_, Anderson(tol=tol, rescue=False), monkeypatch)[0]
        converged = (cells.outcome == Outcome.CONVERGED).double().mean()
        assert abs(converged - float(share.rstrip("%")) / 100) <= 0.02
    residual = solve_rounded(round_, Anderson(tol=1e-12, rescue=False), monkeypatch)[0].residual
    for found, documented in zip((residual.median(), residual.max()), best.split("/"), strict=True):
        assert 2 / 3 <= found / float(documented) <= 3 / 2
