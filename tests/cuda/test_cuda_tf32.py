"""What TF32 promises for gradients: those of the linearised map, unless a relu's sign was turned.

A row whose relu gets a number within TF32's rounding of zero may have the gradient of the other
side, as good a subgradient of the rounded map, and far from that of the exact one.
"""

from __future__ import annotations

import pytest
import torch
from cpu_cases import Case
from cuda_cases import Problem, device, limit_for
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deqfuse.backends import cpu_native, cuda_native, maps

UNIT = 2.0**-11  # of an operand's rounding, relative
CASE = Case(rows=17, dim=300, groups=4, n=2, dtype="f32")


def ten_bits(t: Tensor) -> Tensor:
    """As the tensor cores round their operands."""
    single = t.float().contiguous()
    return ((single.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).to(t)


class Relus(TorchFunctionMode):
    """What the relus are given."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.relu:
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))


def relu_inputs(problem: Problem) -> list[Tensor]:
    _, z, x, flat = problem.cells
    params = maps.CellParams.stack([p.double() for p in flat])
    with Relus() as relus:
        maps.residual_cell(z.double(), x.double(), params, CASE.groups, maps.VARIANTS["paper"])
    return relus.inputs


def test_gradients_are_those_of_float32_but_where_a_relu_turned(monkeypatch) -> None:
    problem = Problem(CASE)
    truth, _ = problem.run("cells", cpu_native, dtype=torch.float64, tol=1e-13)
    with device(limit_for("steps", CASE)):
        given, _ = problem.run("cells", cuda_native, tol=1e-4, allow_tf32=True)
    exact = relu_inputs(problem)
    linear = maps.linear
    monkeypatch.setattr(maps, "linear", lambda a, w, b: linear(ten_bits(a), ten_bits(w), b))
    turned = sum(
        ((a > 0) != (b > 0)).sum(-1) for a, b in zip(exact, relu_inputs(problem), strict=True)
    )
    error = (given["dx"] - truth["dx"]).norm(dim=-1) / truth["dx"].norm(dim=-1)
    # Two roundings of each of four products, and as much again from the solve around them.
    assert (error[turned == 0] <= 16 * UNIT).all()
    assert (error > 16 * UNIT).any(), "a problem where it happens"
    assert turned.sum() <= 5


@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_without_a_turn_all_gradients_are_within_a_few_roundings(kind: str) -> None:
    """Parameters' gradients sum up all rows, so one turned row would show in them."""
    problem = Problem(Case(rows=17, dim=300, groups=4, n=1, dtype="f32"), mask=True)
    truth, _ = problem.run(kind, cpu_native, dtype=torch.float64, tol=1e-13)
    with device(limit_for("steps", problem.case)):
        given, _ = problem.run(kind, cuda_native, tol=1e-4, allow_tf32=True)
    for name, wanted in truth.items():
        assert (given[name] - wanted).norm() <= 16 * UNIT * wanted.norm(), name
