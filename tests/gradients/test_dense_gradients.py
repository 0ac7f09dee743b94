"""Every gradient of the layer against exact implicit gradients from dense Jacobians, in float64."""

from __future__ import annotations

import pytest
import torch
from parameters import scatter_injection, scatter_norms
from torch import Tensor

from deqfuse import (
    Anderson,
    Broyden,
    ConvergenceError,
    DEQFusion,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Picard,
    Unrolled,
    testing,
)
from deqfuse.backends.maps import VARIANTS
from deqfuse.nn import fusion as fusion_module
from deqfuse.nn.cells import dropout_mask

# Solves stop at a relative residual of 1e-12; the condition numbers met here are below 1e3.
LIMIT = 1e-8
TIGHT = Anderson(tol=1e-12, max_iter=500)
TIGHT_ADJOINT = Implicit(tol=1e-12, max_iter=500)


def make(dim: int = 12, n: int = 3, **options) -> DEQFusion:
    """A layer whose parameters are all away from their initial zeros and ones."""
    torch.manual_seed(100 * dim + n)
    fusion = DEQFusion(dim, n, **{"num_groups": 2, **options})
    scatter_norms(fusion, last_norm=0.3)
    scatter_injection(fusion)
    return fusion


def features(fusion: DEQFusion, *lead: int) -> list[Tensor]:
    widths = [fusion.dim] * fusion.num_modalities
    if fusion.projections is not None:
        widths = [p.in_features for p in fusion.projections]
    return [torch.randn(*lead, width) for width in widths]


def assert_exact(errors: dict[str, float]) -> None:
    wrong = {name: error for name, error in errors.items() if not error <= LIMIT}
    assert not wrong


# ---- the whole layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_and_input(variant, n):
    fusion = make(12, n, variant=variant)
    errors = testing.gradient_errors(fusion, features(fusion, 3))
    assert len(errors) == 10 * n + 6 + 1 + (variant != "paper") + n
    assert_exact(errors)


@pytest.mark.parametrize(
    ("dim", "groups"), [(12, 4), (20, 5), (50, 2)], ids=["12-4", "20-5", "50-2"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_group_sizes(variant, dim, groups):
    fusion = make(dim, 2, num_groups=groups, variant=variant)
    assert_exact(testing.gradient_errors(fusion, features(fusion, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", ["contractive", "torch"])
def test_wider_layers_as_they_are_initialised(variant, n, init):
    torch.manual_seed(n)
    fusion = DEQFusion(64, n, variant=variant, init=init)
    assert_exact(testing.gradient_errors(fusion, features(fusion, 8)))


@pytest.mark.parametrize(
    "options",
    [
        {"in_dims": [5, 12, 31]},
        {"injection_norm": True},
        {"in_dims": [5, 12, 31], "injection_norm": True, "variant": "released-mmimdb"},
        {"cell": "identity", "variant": "released"},
        {"combine": "sum"},
        {"combine": "weighted_sum", "variant": "released"},
        {"gate": False},
        {"gate": False, "variant": "released-mmimdb"},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_options_and_ablations(options):
    fusion = make(**options)
    assert_exact(testing.gradient_errors(fusion, features(fusion, 3)))


@pytest.mark.parametrize("linear", ["auto", "gmres", "bicgstab", "anderson", "neumann", "dense"])
def test_adjoint_solvers(linear):
    fusion = make(adjoint=Implicit(solver=linear))
    assert_exact(testing.gradient_errors(fusion, features(fusion, 3)))


@pytest.mark.parametrize(
    "solver", [Anderson(), Anderson(m=2, beta=0.8), Picard(), Broyden(), NewtonKrylov()], ids=repr
)
def test_forward_solvers(solver):
    fusion = make(solver=solver)
    assert_exact(testing.gradient_errors(fusion, features(fusion, 3)))


def test_leading_dimensions():
    fusion = make(n=2)
    assert_exact(testing.gradient_errors(fusion, features(fusion, 2, 2)))
    assert_exact(testing.gradient_errors(fusion, features(fusion)))


# ---- the oracle itself can say no ----------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [OneStep(), Neumann(k=1)], ids=repr)
def test_approximate_gradients_are_told_apart(adjoint):
    fusion = make(adjoint=adjoint)
    errors = testing.gradient_errors(fusion, features(fusion, 3))
    assert errors["features[0]"] > 1e-3
    assert errors["combine.fuse.weight"] > 1e-3
    assert errors["cells.0.linear2.weight"] > 1e-3


def test_neumann_series_approaches_the_exact_gradient():
    def worst(k: int) -> float:
        fusion = make(adjoint=Neumann(k=k))
        return max(testing.gradient_errors(fusion, features(fusion, 3)).values())

    assert worst(1) > 3 * worst(4) > 9 * worst(12)
    assert worst(200) <= LIMIT


def test_rows_that_do_not_converge_are_left_out():
    fusion = make(n=2)
    xs = features(fusion, 4)
    xs[0][1] = torch.nan
    assert_exact(testing.gradient_errors(fusion, xs))
    with pytest.raises(ConvergenceError, match="no row of 1 reached 1e-12"):
        testing.gradient_errors(fusion, [x[1:2] for x in xs])


def test_gradient_errors_leaves_the_layer_alone():
    fusion = make(n=2).requires_grad_(False)
    before = {name: p.clone() for name, p in fusion.state_dict().items()}
    assert_exact(testing.gradient_errors(fusion.train(), features(fusion, 2)))
    assert fusion.training
    assert all(p.dtype == torch.float32 and p.grad is None for p in fusion.parameters())
    assert all(torch.equal(before[name], p) for name, p in fusion.state_dict().items())


def test_dense_gradients_refuse_weight_tied_steps():
    fusion = make(n=2, weight_tied_steps=2)
    with pytest.raises(ValueError, match="expected an equilibrium layer"):
        testing.dense_implicit_gradients(fusion, features(fusion, 2), torch.zeros(2, 12))


# ---- against backpropagation and finite differences ----------------------------------------------


def backward(
    fusion: DEQFusion, xs: list[Tensor], cotangents: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Gradients by name, as ``testing.dense_implicit_gradients`` returns them."""
    inputs = [x.clone().requires_grad_() for x in xs]
    outputs = fusion(inputs, return_cells=True)[: len(cotangents)]
    names = [name for name, _ in fusion.named_parameters()]
    leaves = [*fusion.parameters(), *inputs]
    names += [f"features[{i}]" for i in range(len(xs))]
    grads = torch.autograd.grad(
        outputs, leaves, cotangents, allow_unused=True, materialize_grads=True
    )
    return dict(zip(names, grads, strict=True))


def assert_close(given: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert given.keys() == exact.keys()
    for name, expected in exact.items():
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((given[name] - expected).abs().max()) <= LIMIT * scale, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "solver",
    [
        Picard(tol=1e-12, max_iter=500),
        # The weights are functions of residual vectors that shrink to 1e-12; only the ridge bounds
        # their derivatives, by 1e-12 / 1e-6 with its default, which would be too loose.
        Anderson(tol=1e-12, max_iter=500, lam=1e-2),
    ],
    ids=["picard", "anderson"],
)
def test_implicit_equals_unrolled(solver, variant):
    """Backpropagation through the solver's own steps shares nothing with the implicit rule."""
    fusion = make(variant=variant, solver=solver, adjoint=TIGHT_ADJOINT).double()
    xs = [x.double() for x in features(fusion, 3)]
    g = (torch.randn(3, 12, dtype=torch.float64), torch.randn(3, 3, 12, dtype=torch.float64))
    implicit = backward(fusion, xs, g)
    fusion.adjoint = Unrolled()
    assert_close(backward(fusion, xs, g), implicit)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_mask(monkeypatch, variant, gate):
    fusion = make(
        variant=variant, gate=gate, dropout=0.4, solver=TIGHT, adjoint=TIGHT_ADJOINT
    ).double()
    xs = [x.double() for x in features(fusion, 3)]
    mask = dropout_mask(xs[0], 0.4)
    assert mask.unique().numel() == 2
    monkeypatch.setattr(fusion_module, "dropout_mask", lambda like, p: mask)
    g = (torch.randn(3, 12, dtype=torch.float64), torch.randn(3, 3, 12, dtype=torch.float64))
    exact = testing.dense_implicit_gradients(fusion, xs, *g, mask=mask)
    assert_close(backward(fusion, xs, g), exact)
    without = testing.dense_implicit_gradients(fusion.eval(), xs, *g)
    moved = (without["combine.fuse.weight"] - exact["combine.fuse.weight"]).abs().max()
    assert moved > 1e-3


@pytest.mark.parametrize("only", ["fused", "cells"])
def test_cotangent_on_one_output_only(only):
    fusion = make(solver=TIGHT, adjoint=TIGHT_ADJOINT).double()
    xs = [x.double() for x in features(fusion, 3)]
    g_z = torch.randn(3, 12, dtype=torch.float64) * (only == "fused")
    g_cells = torch.randn(3, 3, 12, dtype=torch.float64) * (only == "cells")
    given = backward(fusion, xs, (g_z, g_cells))
    assert_close(given, testing.dense_implicit_gradients(fusion, xs, g_z, g_cells))
    fuse = [name for name in given if name.startswith(("combine", "modality"))]
    assert all(bool(given[name].any()) == (only == "fused") for name in fuse)


def test_same_tensor_as_two_modalities():
    fusion = make(n=2, solver=TIGHT, adjoint=TIGHT_ADJOINT).double()
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 12, dtype=torch.float64)
    (given,) = torch.autograd.grad(fusion([x, x]), x, g)
    exact = testing.dense_implicit_gradients(fusion, [x, x], g)
    assert_close({"x": given}, {"x": exact["features[0]"] + exact["features[1]"]})


def test_rows_share_nothing_but_the_parameters():
    """Parameter gradients of a batch are the sum over its rows."""
    fusion = make(n=2, solver=TIGHT, adjoint=TIGHT_ADJOINT).double()
    xs = [x.double() for x in features(fusion, 4)]
    g = (torch.randn(4, 12, dtype=torch.float64), torch.randn(2, 4, 12, dtype=torch.float64))
    whole = backward(fusion, xs, g)
    rows = [
        backward(fusion, [x[b : b + 1] for x in xs], (g[0][b : b + 1], g[1][:, b : b + 1]))
        for b in range(4)
    ]
    combined = {
        name: (torch.cat if name.startswith("features") else sum)([row[name] for row in rows])
        for name in whole
    }
    assert_close(whole, combined)
