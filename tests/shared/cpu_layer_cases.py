"""What the tests of the whole layer on the C++ backend share."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import TIGHT, Case
from parameters import scatter_injection
from torch import Tensor

from deqfuse import Anderson, DEQFusion, Implicit
from deqfuse.backends.maps import VARIANTS

ops = torch.ops.deqfuse

EXACT = {"solver": Anderson(tol=1e-12, max_iter=500), "adjoint": Implicit(tol=1e-12, max_iter=500)}
RELEASED = Case(variant="released")
PRECISE = ("f64", "f32")
WIDTHS = ((12, 4), (20, 4), (64, 4), (130, 5))
each_variant = pytest.mark.parametrize("variant", VARIANTS)
optional = pytest.mark.parametrize("full", [False, True], ids=["plain", "mask,warm"])


def layer_of(case: Case, **options) -> DEQFusion:
    """Also the parameters of the injection are away from their initial values."""
    layer = case.layer(**{"backend": "cpu", **EXACT, **options})
    scatter_injection(layer)
    return layer


def flat(layer: DEQFusion) -> list[Tensor]:
    params = [t for part in (*layer.cells, layer.combine) for t in part.flat()]
    return [t for t in (*params, layer.modality_weights, layer.injection_bias) if t is not None]


def draw(case: Case, grad: bool = True) -> tuple[list[Tensor], Tensor]:
    """Features, and a cotangent of (z, zs), the same at every call."""
    torch.manual_seed(1)
    xs = [case.draw().requires_grad_(grad) for _ in range(case.n)]
    return xs, case.draw(case.n + 1)


def problem(case: Case, full: bool, **options) -> tuple:
    """Arguments of the operator up to the groups; ``full``: with mask and warm start."""
    params, (xs, more) = [t.detach() for t in flat(layer_of(case, **options))], draw(case, False)
    mask = 1.25 * (more[-1] > -0.8).to(more.dtype)
    return xs, params, *((mask, more[0], 0.3 * more[1:]) if full else (None, None, None))


def solve(case: Case, call: tuple, solver=TIGHT, backend: str = "cpu"):
    code = (solver.code, Implicit().code, backend, "ignore")
    return ops.solve_layer(*call, None, case.groups, case.variant, *code)


def injections(xs: list[Tensor], weights: Tensor, bias: Tensor | None, zs: Tensor) -> list[Tensor]:
    """``sum_i w_i x_i + bias`` and ``sum_i z_i``, in the operator's order of summation."""
    weights = weights.to(zs.dtype)
    x_fuse = sum((w * x.to(zs.dtype) for w, x in zip(weights, xs, strict=True)), torch.zeros(()))
    return [x_fuse if bias is None else x_fuse + bias.to(zs.dtype), sum(zs, torch.zeros(()))]


def gradients(layer: DEQFusion, xs: list[Tensor], g: Tensor, loss: str = "both") -> dict:
    """By name, for whatever requires a gradient."""
    z, zs = layer(xs, return_cells=True)
    outputs = {"z": [z], "cells": [zs], "both": [z, zs]}[loss]
    cotangents = {"z": [g[0]], "cells": [g[1:]], "both": [g[0], g[1:]]}[loss]
    leaves = {f"x{i}": x for i, x in enumerate(xs)} | dict(layer.named_parameters())
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(  # a loss on the cells alone does not use the fuse step
        outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, grads, strict=True))


def assert_near(given: dict, expected: dict, limit: float) -> None:
    scale = 1e-4 * max(float(e.abs().max()) for e in expected.values())
    assert given.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (given[name].shape, given[name].dtype) == (wanted.shape, wanted.dtype), name
        error = (given[name] - wanted).abs().max() / max(wanted.abs().max(), scale)
        assert error <= limit, (name, float(error))
