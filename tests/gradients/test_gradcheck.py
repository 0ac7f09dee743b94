"""Gradients against finite differences in float64, and what happens to second derivatives.

``gradcheck`` perturbs by 1e-6, so every solve is tight: an error of 1e-12 in a solution is 1e-6 in
a difference quotient. Its fast mode compares random projections of the Jacobian.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from parameters import scatter_norms
from torch import Tensor

from deqfuse import (
    DEQ,
    Anderson,
    DEQFusion,
    DoubleBackwardError,
    Implicit,
    Neumann,
    OneStep,
    Picard,
    Unrolled,
    functional,
)
from deqfuse.backends.maps import VARIANTS

D = 12
gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)
TIGHT = {
    "solver": Anderson(tol=1e-13, max_iter=500),
    "adjoint": Implicit(tol=1e-13, max_iter=500),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(n: int, **options) -> DEQFusion:
    torch.manual_seed(n)
    fusion = DEQFusion(D, n, **{"num_groups": 2, **TIGHT, **options}).double()
    scatter_norms(fusion)
    return fusion


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def flat_cells(fusion: DEQFusion) -> list[Tensor]:
    return [t for cell in fusion.cells for t in cell.flat()]


# ---- first derivatives ---------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("n", [1, 2])
def test_solve_cells(variant, n):
    fusion = make(n, variant=variant)

    def solve(x: Tensor, *params: Tensor) -> Tensor:
        return functional.solve_cells(x, params, num_groups=2, variant=variant, **TIGHT)[0]

    assert gradcheck(solve, (randn(n, 2, D), *flat_cells(fusion)))


@each_variant
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
def test_solve_fuse(variant, masked):
    fusion = make(3, variant=variant)
    mask = torch.bernoulli(torch.full((2, D), 0.5).double()) * 2 if masked else None

    def solve(x_fuse: Tensor, cell_sum: Tensor, *params: Tensor) -> Tensor:
        common = {"num_modalities": 3, "num_groups": 2, "mask": mask, "variant": variant}
        return functional.solve_fuse(x_fuse, cell_sum, params, **common, **TIGHT)[0]

    assert gradcheck(solve, (randn(2, D), randn(2, D), *fusion.combine.flat()))


def layer_function(fusion: DEQFusion):
    """The layer as a function of its inputs and all its parameters, and these as tensors."""
    names, params = zip(*fusion.named_parameters(), strict=True)
    n = fusion.num_modalities

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors[n:], strict=True))
        out = torch.func.functional_call(
            fusion, given, (tensors[:n],), {"return_cells": fusion.combine_kind != "weighted_sum"}
        )
        return out if isinstance(out, tuple) else (out,)

    return call, params


@each_variant
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_dims": [3, 5], "injection_norm": True},
        {"gate": False},
        {"cell": "identity"},
        {"combine": "sum"},
        {"combine": "weighted_sum"},
        {"weight_tied_steps": 2},
    ],
    ids=str,
)
def test_layer(options, variant):
    fusion = make(2, variant=variant, **options)
    call, params = layer_function(fusion)
    widths = options.get("in_dims", [D, D])
    assert gradcheck(call, (*(randn(2, width) for width in widths), *params))


def test_gradcheck_sees_an_approximate_gradient():
    """The same check fails where the gradient is only that of one step."""
    fusion = make(2, adjoint=OneStep())
    call, params = layer_function(fusion.requires_grad_(False))
    assert not gradcheck(call, (randn(1, D), randn(1, D), *params), raise_exception=False)


@pytest.mark.parametrize("linear", ["gmres", "bicgstab", "anderson", "neumann", "dense"])
def test_adjoint_solvers(linear):
    fusion = make(2, adjoint=dataclasses.replace(TIGHT["adjoint"], solver=linear))
    call, params = layer_function(fusion)
    assert gradcheck(call, (randn(2, D), randn(2, D), *params))


# ---- second derivatives --------------------------------------------------------------------------


def second_derivative(fusion: DEQFusion, loss, leaf: str) -> None:
    xs = [randn(2, D), randn(2, D)]
    wanted = {"input": xs[0], "parameter": fusion.modality_weights}[leaf]
    (grad,) = torch.autograd.grad(loss(fusion(xs, return_cells=True)), wanted, create_graph=True)
    grad.square().sum().backward()


LOSSES = {
    "linear": lambda out: (out[0] * torch.linspace(-1, 1, D, dtype=torch.float64)).sum(),
    "sum": lambda out: out[0].sum(),  # its cotangent is a constant that requires no gradient
    "quadratic": lambda out: out[0].square().sum() + out[1].pow(3).sum(),
    "cells": lambda out: out[1].pow(3).sum(),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("adjoint", [TIGHT["adjoint"], OneStep(), Neumann(k=3)], ids=repr)
@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivatives_of_the_implicit_rule_are_refused(loss, adjoint, frozen):
    fusion = make(2, adjoint=adjoint).requires_grad_(not frozen)
    with pytest.raises(DoubleBackwardError, match=r"Remedy: use adjoint=Unrolled\(\)"):
        second_derivative(fusion, LOSSES[loss], "input")


@pytest.mark.parametrize("loss", ["linear", "sum", "quadratic"])
def test_second_derivatives_in_a_parameter_are_refused(loss):
    with pytest.raises(DoubleBackwardError):
        second_derivative(make(2), LOSSES[loss], "parameter")


@pytest.mark.parametrize("loss", ["linear", "sum", "quadratic"])
def test_second_derivatives_of_any_callable_are_refused(loss):
    weight = (0.2 * torch.randn(D, D)).double().requires_grad_()
    deq = DEQ(lambda z, x: torch.tanh(z @ weight + x), **TIGHT)
    x = randn(2, D)
    z, _ = deq(torch.zeros_like(x), x)
    (grad,) = torch.autograd.grad(LOSSES[loss]((z, z)), x, create_graph=True)
    with pytest.raises(DoubleBackwardError):
        grad.square().sum().backward()


@each_variant
def test_second_derivatives_of_unrolled_steps_are_right(variant):
    """Hessian products against finite differences of the implicit first derivative."""
    solver = Picard(tol=1e-13, max_iter=500)
    fusion = make(2, variant=variant, solver=solver, adjoint=Unrolled())

    def call(x0: Tensor, x1: Tensor) -> Tensor:
        return fusion([x0, x1])

    assert torch.autograd.gradgradcheck(call, (randn(1, D), randn(1, D)), fast_mode=True)
