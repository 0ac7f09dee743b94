"""Cells and an injection of a user's own: the answers, the gradients, and what is said of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from given_cases import (
    DIM,
    KINDS,
    TIGHT,
    JointInjection,
    N,
    ScaleCell,
    T,
    TanhCell,
    features,
    layer_of,
)
from parameters import scatter_norms
from torch import Tensor, nn

from deqfuse import (
    Anderson,
    Broyden,
    DEQFusion,
    Implicit,
    NewtonKrylov,
    OneStep,
    Outcome,
    ResidualCell,
    Unrolled,
    WarmStart,
)
from deqfuse.testing import gradient_errors, naive_root

# Both sides solve to relative residuals of 1e-12, and |(I - J)^-1| is below 10 for these maps: an
# error of 1e-11 in the state and in u; three digits are left for second derivatives of the maps.
LIMIT = 1e-8

OPTIONS: dict[str, dict[str, Any]] = {
    "released": {"variant": "released"},
    "no gate": {"gate": False},
    "sum": {"combine": "sum"},
    "not normed": {"injection_norm": False},
    "projected": {"in_dims": (5, 5, 5)},
    "unrolled": {"adjoint": Unrolled()},
    "broyden": {"solver": Broyden()},
    "newton": {"solver": NewtonKrylov()},
    "all given": {"cells": [TanhCell(), TanhCell(0.2), TanhCell()]},
    "dense adjoint": {"adjoint": Implicit(solver="dense")},
}


# ---- answers and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("injection", [False, True], ids=["weighted sum", "injection"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_system(kind: str, injection: bool) -> None:
    layer = layer_of(kind, injection=JointInjection() if injection else None)
    errors = gradient_errors(layer, features(kind))
    assert len(errors) == len(list(layer.parameters())) + N
    assert max(errors.values()) < LIMIT


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_with_other_options(name: str) -> None:
    layer = layer_of(**OPTIONS[name])
    xs = features(width=5 if name == "projected" else DIM)
    assert max(gradient_errors(layer, xs).values()) < LIMIT


@pytest.mark.parametrize("kind", KINDS)
def test_answers_solve_the_naive_equations(kind: str) -> None:
    layer, xs = layer_of(kind, **TIGHT), features(kind)
    z, zs, info = layer(xs, return_cells=True, return_info=True)
    root = naive_root(layer, xs)
    torch.testing.assert_close(z.reshape(-1, DIM), root[:, -1], rtol=0, atol=1e-10)
    expected = root[:, :-1].transpose(0, 1).reshape(zs.shape)
    torch.testing.assert_close(zs, expected, rtol=0, atol=1e-10)
    assert info.converged.all()


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("steps", [None, 3], ids=["equilibrium", "steps"])
@pytest.mark.parametrize("which", [(0, 2), (0, 1, 2)], ids=["some", "all"])
def test_the_layers_own_cells_as_given_ones(
    which: tuple[int, ...], steps: int | None, variant: Any
) -> None:
    torch.manual_seed(0)
    common: dict[str, Any] = {"num_groups": 2, "variant": variant, **TIGHT}
    own = DEQFusion(DIM, N, weight_tied_steps=steps, **common).double()
    scatter_norms(own)
    cells = [copy.deepcopy(own.cells[i]) if i in which else None for i in range(N)]
    given = DEQFusion(DIM, N, weight_tied_steps=steps, cells=cells, **common).double()
    given.load_state_dict(own.state_dict())
    results = []
    for layer in (own, given):
        xs = [x.requires_grad_() for x in features()]
        z, zs, info = layer(xs, return_cells=True, return_info=True)
        (z.sin().sum() + zs.cos().sum()).backward()
        results.append([z, zs, *(x.grad for x in xs), *(p.grad for p in layer.parameters())])
        assert info.spectral_radius().shape == (N + 1, 5)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_none_and_residual_are_the_layer_itself() -> None:
    layers = []
    for cells in (None, [None, "residual", None], nn.ModuleList(TanhCell() for _ in range(N))):
        torch.manual_seed(0)
        layers.append(DEQFusion(DIM, N, cells=cells).double())
    a, b, other = (layer(features()) for layer in layers)
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert list(layers[0].state_dict()) == list(layers[1].state_dict())


def test_dropout_start_and_leading_dimensions() -> None:
    layer = layer_of("convolution", dropout=0.3, solver=Anderson(tol=1e-10, max_iter=200))
    xs = [x.reshape(2, 3, T, DIM) for x in features("convolution", rows=6)]
    torch.manual_seed(0)
    z, zs, info = layer(xs, return_cells=True, return_info=True)
    assert z.shape == (2, 3, T, DIM)
    assert zs.shape == (N, 2, 3, T, DIM)
    assert info.cells.outcome.shape == (N, 2, 3, T)
    torch.manual_seed(0)
    again, warm = layer(xs, z0=(z, zs), return_info=True)
    torch.testing.assert_close(again, z, rtol=0, atol=1e-8)
    assert (warm.cells.nfe[[0, 2]] == 1).all()  # they contract: f(z), the start, is nearer still
    assert (warm.nfe < info.nfe).all()
    assert layer([x[:, :0] for x in xs]).shape == (2, 0, T, DIM)


def test_16_bits_and_autocast() -> None:
    layer = layer_of("attention", on_failure="ignore").to(torch.bfloat16)  # its own rounding: 4e-3
    xs = features("attention")
    z, zs, info = layer([x.bfloat16() for x in xs], return_cells=True, return_info=True)
    assert z.dtype == zs.dtype == torch.bfloat16
    assert info.cells.residual.dtype == torch.float32
    info.jacobian_penalty().backward()
    layer = layer_of("attention", injection=JointInjection()).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer([x.float() for x in xs]).isfinite().all()


def test_a_cell_may_work_in_place() -> None:
    class InPlace(ScaleCell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            with torch.no_grad():
                z.mul_(0.5)
            return z + x

    for steps in (None, 3):
        given = [InPlace(0.0), ScaleCell(0.5)]
        results = []
        for cell in given:
            layer = layer_of(cells=[cell, None, None], weight_tied_steps=steps, on_failure="ignore")
            with torch.no_grad():
                z, info = layer(features(), return_info=True)
            results.append((z, info.cells.residual))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_warm_starts_of_a_training() -> None:
    layer, xs = layer_of("convolution"), features("convolution")
    warm, rows = WarmStart(layer, num_rows=5 * T), torch.arange(5 * T).reshape(5, T)
    counts = [warm(xs, rows, return_info=True)[1].cells.nfe for _ in range(2)]
    assert (counts[1][[0, 2]] <= 2).all()
    assert (counts[0][[0, 2]] > 3).all()


# ---- what is said of them ------------------------------------------------------------------------


def test_the_record_has_each_cell_in_its_place() -> None:
    layer = layer_of(cells=[ScaleCell(0.3), None, ScaleCell(-0.6)], **TIGHT)
    _, info = layer(features(), return_info=True)
    radius = info.spectral_radius()
    assert radius.shape == (N + 1, 5)
    # a z has no direction that grows by another factor: every product is by |a|, up to rounding.
    torch.testing.assert_close(radius[[0, 2]], torch.tensor([[0.3], [0.6]]).double().expand(2, 5))
    assert (radius[1] - 0.3).abs().min() > 1e-3


def test_a_sample_is_one_problem_and_its_rows_share_the_statistics() -> None:
    options: dict[str, Any] = {"cells": [ScaleCell(0.3), None, ScaleCell(-0.6)]}
    options |= {"solver": Anderson(trace=True), "injection_norm": False}
    layer = layer_of("convolution", **options)
    xs = features("convolution")
    _, info = layer(xs, return_info=True)
    for block in (info.cells.residual, info.cells.nfe, info.cells.trace.nan_to_num(-1.0)):
        given = block[..., [0, 2], :, :]
        assert (given == given[..., :1]).all()
    # By hand: the first evaluation of z = 0.3 z + x from zero is x, for which |f(z) - z| = |x|.
    norm = xs[0].flatten(1).norm(dim=1)
    expected = (norm / (norm + 1e-5))[:, None].expand(-1, T)
    torch.testing.assert_close(info.cells.trace[0, 0], expected)
    radius = info.spectral_radius()
    torch.testing.assert_close(radius[0], torch.full((5, T), 0.3).double())
    assert info.cells.trace.shape == (layer.solver.max_iter, N, 5, T)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("steps", [None, 3], ids=["equilibrium", "steps"])
@pytest.mark.parametrize("dims", [1, 2])
def test_the_penalty_is_that_of_the_formula(dims: int, steps: int | None, masked: bool) -> None:
    """J = a I: |J^T v|^2 = a^2 |v|^2, with the derivative 2 a |v|^2, for the same probes."""
    kind = "convolution" if dims == 2 else "tanh"
    scales = (0.3, 0.5, -0.6)
    layer = layer_of(
        kind, cells=[ScaleCell(a) for a in scales], cell_dims=dims, combine="sum",
        weight_tied_steps=steps, on_failure="ignore",
    )  # fmt: skip
    xs = features(kind)
    present = torch.ones(*xs[0].shape[:-1], N, dtype=torch.bool)
    if masked:
        present[1, ..., 0] = present[2, ..., 2] = False
    _, info = layer(xs, present=present if masked else None, return_info=True)
    torch.manual_seed(3)
    penalty = info.jacobian_penalty(2)
    penalty.backward()
    torch.manual_seed(3)
    squares = []
    for i in range(N):
        here = present[..., i, None].reshape(len(xs[0]), -1, 1)
        shape = (len(xs[0]), T ** (dims - 1) * DIM)
        probes = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
        probes = torch.stack(probes).reshape(2, len(xs[0]), -1, DIM)
        squares.append(torch.where(here, probes, 0.0).square().sum() / 2)
    count = present.sum() * DIM
    expected = sum(a**2 * s for a, s in zip(scales, squares, strict=True)) / count
    torch.testing.assert_close(penalty.detach(), expected, rtol=1e-6, atol=0)  # a is a float32
    for cell, a, s in zip(layer.cells, scales, squares, strict=True):
        torch.testing.assert_close(cell.a.grad, 2 * a * s / count, rtol=1e-6, atol=0)


# ---- modules -------------------------------------------------------------------------------------


def test_names_copies_and_resets() -> None:
    layer = layer_of(injection=JointInjection(), variant="released")
    names = list(layer.state_dict())
    assert {"cells.0.linear.weight", "cells.1.norm1.bias", "injection.linear.bias"} <= set(names)
    assert layer.modality_weights is None
    assert layer.injection_bias is None
    twin, xs = copy.deepcopy(layer), features()
    expected = layer(xs)
    with torch.no_grad():
        twin.cells[2].linear.weight.zero_()
    assert torch.equal(layer(xs), expected)
    assert not torch.equal(twin(xs), expected)

    sequence = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())  # no reset of its own
    layer.cells[0] = sequence
    before = {name: p.clone() for name, p in layer.named_parameters()}
    torch.manual_seed(5)
    layer.reset_parameters()
    weights = [
        name for name in before if name.endswith("linear.weight") or name == "cells.0.0.weight"
    ]
    changed = dict(layer.named_parameters())
    assert all(not torch.equal(before[name], changed[name]) for name in weights)
    norm = torch.linalg.matrix_norm(layer.cells[2].linear.weight, 2)
    torch.testing.assert_close(
        norm, torch.tensor(0.6).double()
    )  # the cell's own draw, not its part's


def test_a_given_cell_is_called_and_its_hooks_fire() -> None:
    layer, calls = layer_of(), []
    layer.cells[0].register_forward_hook(lambda *_: calls.append(1))
    _, info = layer(features(), return_info=True)
    assert len(calls) == info.cells.nfe[0].max() + 1  # the last one is what gradients go through


def test_one_step_gradients_need_no_solve() -> None:
    layer = layer_of(adjoint=OneStep())
    layer(features()).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_an_own_cell_keeps_its_rescue_and_a_given_one_has_that_of_deq() -> None:
    """Without ``rescue=True`` a given cell that is given up has failed: who knows its bounds?"""
    outcomes = []
    for rescue in (None, True):
        solver = Anderson(tol=1e-10, max_iter=3, rescue=rescue)
        layer = layer_of(solver=solver, on_failure="ignore")
        _, info = layer(features(), return_info=True)
        outcomes.append(info.cells.outcome)
        assert (info.cells.outcome[1] == Outcome.RESCUED).any()
    assert (outcomes[0][[0, 2]] == Outcome.MAX_ITER).all()
    assert (outcomes[1][[0, 2]] == Outcome.RESCUED).all()


def test_residual_cells_may_be_built_and_given() -> None:
    cells = [ResidualCell(DIM, num_groups=2) for _ in range(N)]
    layer = DEQFusion(DIM, N, num_groups=4, cells=cells)  # groups of their own
    assert layer([x.float() for x in features()]).shape == (5, DIM)
