"""Gradients of the whole layer on the C++ backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from cpu_cases import DTYPES, LOOSE, Case, assert_equal, named
from cpu_layer_cases import (
    WIDTHS,
    assert_near,
    draw,
    each_variant,
    gradients,
    injections,
    layer_of,
    problem,
    solve,
)
from torch import Tensor

from deqfuse import Anderson, Implicit
from deqfuse.backends import cpu_adjoint as cpu
from deqfuse.backends.layer import LayerParams
from deqfuse.backends.maps import VARIANTS
from deqfuse.errors import DoubleBackwardError

# ---- gradients -----------------------------------------------------------------------------------

LOSSES = ("z", "cells", "both")


def on_both(case: Case, loss: str = "both", **options) -> list[dict]:
    (xs, g), found = draw(case), []
    for backend in ("cpu", "reference"):
        layer = layer_of(case, backend=backend, **options)
        torch.manual_seed(2)  # the same dropout mask
        found.append(gradients(layer, xs, g, loss))
    return found


GRADIENTS = [
    *(Case(r, n=n, variant="released") for r in (1, 17, 70) for n in range(1, 5)),
    *(Case(9, d, g, variant=v) for (d, g), v in itertools.product(WIDTHS[:3], VARIANTS)),
    Case(5, 130, 5, variant="released"),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", **named(GRADIENTS))
def test_gradients_agree_with_the_reference(case, loss):
    given, expected = on_both(case, loss)
    assert_near(given, expected, 1e-8)
    fused = ("combine.", "modality_weights", "injection_bias")
    for name, grad in given.items():  # the fuse step is not behind the cells
        assert bool(grad.any()) == (loss != "cells" or not name.startswith(fused)), name


@each_variant
def test_gradients_of_masked_rows_agree(variant):
    assert_near(*on_both(Case(20, 20, 4, variant=variant), dropout=0.4), 1e-8)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_gradients_in_low_precision_agree(dtype):
    case = Case(33, variant="released", dtype=dtype)
    limit = 3e-3 if dtype == "f32" else 8 * torch.finfo(DTYPES[dtype]).eps
    assert_near(*on_both(case, solver=LOOSE, adjoint=Implicit(tol=1e-5)), limit)


def test_the_adjoint_is_that_of_its_blocks_bit_for_bit():
    case, option = Case(70, 20, 4, 3, "released"), Implicit()
    call, g = problem(case, True), draw(case)[1]
    (xs, params, mask, *_), states = call, solve(case, call)[1]
    zs, z, split = states[:-1], states[-1], LayerParams.split(params, case.n)
    how = (case.groups, VARIANTS[case.variant], option, True)
    both = injections(xs, split.weights, split.bias, zs)
    dx_fuse, dsum, dfuse, fuse = cpu.adjoint_fuse(g[0], z, *both, split.fuse, mask, case.n, *how)
    for more in (None, g[1:]):
        dx, grads, *statistics = cpu.adjoint_layer(g[0], more, states, xs, params, mask, *how)
        owed = dsum.expand_as(zs) if more is None else more + dsum
        dcells, cell_grads, cells = cpu.adjoint_cells(owed, zs, torch.stack(xs), split.cells, *how)
        assert_equal(dx, [d + w * dx_fuse for d, w in zip(dcells, split.weights, strict=True)])
        assert_equal(grads[:-2], cell_grads + dfuse)
        torch.testing.assert_close(grads[-2], torch.stack([(x * dx_fuse).sum() for x in xs]))
        torch.testing.assert_close(grads[-1], dx_fuse.sum()[None])
        expected = [torch.cat([c, f[None]]) for c, f in zip(cells, fuse, strict=True)]
        assert_equal(statistics[0][:3], expected)
        assert statistics[0].all_converged == (not expected[2].any())


def test_only_what_is_asked_for_is_given_and_the_same():
    case = Case(33, variant="released")
    layer, (xs, g) = layer_of(case), draw(case)
    everything = gradients(layer, xs, g)
    layer.cells[0].linear1.weight.requires_grad_(False)
    xs[1].requires_grad_(False)
    subsets = [gradients(layer, xs, g)]
    assert len(subsets[0]) == len(everything) - 2
    subsets.append(gradients(layer, [x.detach() for x in xs], g))
    layer.requires_grad_(False)
    subsets.append(gradients(layer, xs, g))
    assert set(subsets[2]) == {"x0"}
    layer.injection_bias.requires_grad_()
    subsets.append(gradients(layer, [x.detach() for x in xs], g))
    for subset in subsets:
        assert_equal(list(subset.values()), [everything[name] for name in subset])


@each_variant
def test_gradcheck(variant):
    case = Case(2, 8, 2, variant=variant)
    solver, adjoint = Anderson(tol=1e-13, max_iter=500), Implicit(tol=1e-13, max_iter=500)
    layer, (xs, _) = layer_of(case, solver=solver, adjoint=adjoint), draw(case)
    names, params = zip(*layer.named_parameters(), strict=True)

    def call(*tensors: Tensor):
        given = dict(zip(names, tensors[case.n :], strict=True))
        features = (tensors[: case.n],)
        return torch.func.functional_call(layer, given, features, {"return_cells": True})

    assert torch.autograd.gradcheck(call, (*xs, *params), fast_mode=True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_second_derivatives_are_refused(loss, trainable):
    layer, (xs, _) = layer_of(Case(3)).requires_grad_(trainable), draw(Case(3))
    z, zs = layer(xs, return_cells=True)
    total = {"z": z.sum(), "cells": zs.sum(), "both": z.pow(3).sum() + zs.pow(3).sum()}[loss]
    (grad,) = torch.autograd.grad(total, xs[0], create_graph=True)
    with pytest.raises(DoubleBackwardError):
        grad.square().sum().backward()


@pytest.mark.parametrize("lead", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_writing_into_the_results_is_harmless(tracked, lead):
    case = Case(6, variant="released")
    layer, (xs, g) = layer_of(case), draw(case)
    features = [x.view(*lead, case.dim) for x in xs]
    leaves, g = [*xs, *layer.parameters()], (g[0].view(*lead, -1), g[1:].view(case.n, *lead, -1))
    expected = torch.autograd.grad(layer(features, return_cells=True), leaves, g)
    z, zs, info = layer(features, return_cells=True, return_info=True)
    before = [z.clone(), zs.clone()]
    for t in (z, zs):
        (t if tracked else t.detach()).mul_(2)
    assert_equal([z, zs], [2 * t for t in before])
    given = torch.autograd.grad((z, zs), leaves, g)
    assert_equal(given, [(2 if tracked else 1) * t for t in expected])
    assert info.converged.all()
