"""Given cells that fail, that see other rows, or that a mask leaves out: what is said of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from given_cases import (
    DIM,
    TIGHT,
    ConvCell,
    JointInjection,
    N,
    ScaleCell,
    T,
    TanhCell,
    features,
    layer_of,
)
from torch import Tensor, nn

from deqfuse import Anderson, ConvergenceError, ConvergenceWarning, DEQFusion, Implicit, Outcome

# ---- failures ------------------------------------------------------------------------------------


def test_a_cell_that_fails_is_named() -> None:
    cells = [None, ScaleCell(0.0), TanhCell()]  # the second one needs two evaluations
    layer = layer_of(cells=cells, solver=Anderson(tol=1e-12, max_iter=6))
    told = r"deqfuse: 5 of 5 rows of cells\[2\] \(TanhCell\) did not converge: 5 used up"
    with pytest.warns(ConvergenceWarning) as caught:
        _, info = layer(features(), return_info=True)
    said = [str(w.message) for w in caught]
    assert any(re.match(told, text) for text in said)
    assert all("Remedies: Anderson(max_iter=12), Anderson(rescue=True)" in t for t in said[:1])
    assert not any("cells[1]" in text for text in said)
    assert (info.cells.outcome[2] == Outcome.MAX_ITER).all()
    assert not info.converged.any()
    layer.on_failure = "raise"
    with pytest.raises(ConvergenceError, match=r"rows of cells\[2\] \(TanhCell\)"):
        layer(features())


def test_samples_are_counted_where_a_cell_sees_them_at_once() -> None:
    layer = layer_of("convolution", solver=Anderson(tol=1e-12, max_iter=3))
    with pytest.warns(ConvergenceWarning) as caught:
        layer(features("convolution"))
    assert any("5 of 5 rows of cells[0] (ConvCell)" in str(w.message) for w in caught)


def test_a_backward_solve_that_fails_is_named() -> None:
    layer = layer_of(solver=TIGHT["solver"], adjoint=Implicit(solver="gmres", max_iter=1))
    z = layer([x.requires_grad_() for x in features()])
    with pytest.warns(ConvergenceWarning) as caught:
        z.sum().backward()
    said = " ".join(str(w.message) for w in caught)
    assert "the backward solve of cells[0] (TanhCell)" in said
    assert "the backward solve of cells[2] (TanhCell)" in said


# ---- rows that see each other --------------------------------------------------------------------


class Mean(nn.Module):
    """A cell that sees the mean of the batch."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.7 * torch.tanh(z.mean(0, keepdim=True)) + x * x.abs()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.3 * torch.tanh(self.norm(z)) + x


def test_coupled_rows_are_found_out() -> None:
    layer = layer_of(cells=[Mean(), None, None])
    with pytest.warns(ConvergenceWarning, match=r"cells\[0\] \(Mean\).*cell_dims=2 where they are"):
        _, info = layer(features(), return_info=True)
    assert (info.cells.outcome[0] == Outcome.COUPLED).any()
    assert not info.converged.all()


def test_batch_statistics_are_refused_by_the_cells_name() -> None:
    layer, xs = layer_of(cells=[None, None, Normed()]), features()
    with pytest.raises(ValueError, match=r"cells\[2\]: expected rows.*BatchNorm1d \(norm\).*eval"):
        layer(xs)
    assert not layer.cells[2].norm._forward_pre_hooks
    assert layer.eval()(xs).isfinite().all()
    steps = layer_of(cells=[None, None, Normed()], weight_tied_steps=2)
    assert steps(xs).isfinite().all()  # no row stops before another, and the steps are followed


# ---- masks ---------------------------------------------------------------------------------------


def sample_mask() -> Tensor:
    """(5, T, N): sample 1 lacks modality 0, sample 3 modality 2; a row of sample 4 modality 1."""
    present = torch.ones(5, T, N, dtype=torch.bool)
    present[1, :, 0] = present[3, :, 2] = False
    present[4, 2, 1] = False
    return present


@pytest.mark.parametrize("steps", [None, 3], ids=["equilibrium", "steps"])
def test_whole_samples_may_lack_what_a_cell_sees_at_once(steps: int | None) -> None:
    layer = layer_of("convolution", weight_tied_steps=steps, on_failure="ignore", **TIGHT)
    present, clean = sample_mask(), features("convolution")
    results = []
    for rest in (torch.nan, 7.0):
        xs = [torch.where(present[..., i, None], x, rest) for i, x in enumerate(clean)]
        xs = [x.requires_grad_() for x in xs]
        layer.zero_grad()
        z, zs, info = layer(xs, present=present, return_cells=True, return_info=True)
        (z.sum() + zs.sum()).backward()
        results.append([z, zs, *(x.grad for x in xs), *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b), "what stands in an absent feature reaches nothing"
    for i in range(N):
        absent = ~present[..., i]
        assert (zs[i][absent] == 0).all()
        assert (xs[i].grad[absent] == 0).all()
        assert (info.cells.outcome[i][absent] == Outcome.ABSENT).all()
        assert (info.cells.nfe[i][absent] == 0).all()
        assert (info.spectral_radius()[i][absent] < 1e-6).all()
    # A sample with everything is that of a batch of its own.
    alone = layer([x[:1] for x in clean])
    torch.testing.assert_close(z[:1], alone, rtol=1e-9, atol=1e-9)


def test_a_sample_that_lacks_some_positions_is_refused() -> None:
    present = sample_mask()
    present[0, 1, 2] = present[4, 0, 2] = False
    with pytest.raises(
        ValueError, match=r"present: expected cells\[2\].*in 2 of 5 samples.*Remedy"
    ):
        layer_of("convolution")(features("convolution"), present=present)


def test_a_modality_that_no_row_has_leaves_zero_gradients() -> None:
    layer, present = layer_of(), torch.ones(5, N, dtype=torch.bool)
    present[:, 0] = False
    z, info = layer(features(), present=present, return_info=True)
    z.sum().backward()
    assert (info.cells.outcome[0] == Outcome.ABSENT).all()
    assert all((p.grad == 0).all() for p in layer.cells[0].parameters())
    assert all((p.grad != 0).any() for p in layer.cells[2].parameters())


def test_an_injection_sees_zeros_for_what_is_absent() -> None:
    class Watching(JointInjection):
        def forward(self, xs: list[Tensor]) -> Tensor:
            self.seen = xs
            return super().forward(xs)

    layer, present = layer_of("convolution", injection=Watching()), sample_mask()
    xs = [torch.where(present[..., i, None], x, torch.nan) for i, x in
          enumerate(features("convolution"))]  # fmt: skip
    assert layer(xs, present=present).isfinite().all()
    for i, seen in enumerate(layer.injection.seen):
        assert seen.shape == (5, T, DIM)
        assert (seen[~present[..., i]] == 0).all()


# ---- refusals ------------------------------------------------------------------------------------


class Narrow(nn.Module):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z[:, :-1]


class Tuple(nn.Module):
    def forward(self, z: Tensor, x: Tensor) -> Any:
        return z, x


class Sum(nn.Module):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return sum(xs).sum(-1)


BUILD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cells": [None, TanhCell()]}, ValueError,
     r"cells: expected num_modalities=3 entries, modules or None, got 2"),
    ({"cells": TanhCell()}, TypeError, "cells: expected a sequence of modules and None, got Tanh"),
    ({"cells": "residual"}, TypeError, "cells: expected a sequence of modules .*, got 'residual'"),
    ({"cells": [None, "conv", None]}, TypeError, r"cells\[1\]: expected a torch.nn.Mod.*got str"),
    ({"cells": [None, None, torch.tanh]}, TypeError, r"cells\[2\]: .*got builtin.*Remedy: a mod"),
    ({"cells": [TanhCell(), None, None], "cell": "identity"}, ValueError,
     r"cells: expected cell='residual'.*got cell='identity'"),
    ({"cells": [TanhCell(), None, None], "combine": "weighted_sum"}, ValueError,
     "cells: .*got cell='residual' with combine='weighted_sum'"),
    ({"injection": lambda xs: xs[0]}, TypeError, "injection: expected a torch.nn.Module.*function"),
    ({"injection": Sum(), "combine": "sum"}, ValueError, "injection: expected combine='purify'"),
    ({"injection": Sum(), "combine": "weighted_sum"}, ValueError, "injection: .*'weighted_sum'"),
    ({"cell_dims": 2}, ValueError, r"cell_dims: expected cells= or injection= beside it"),
    ({"cell_dims": 0, "injection": Sum()}, ValueError, "cell_dims: expected an int >= 1, got 0"),
    ({"cell_dims": "2", "injection": Sum()}, TypeError, "cell_dims: expected an int, got '2'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "text"), BUILD)
def test_wrong_arguments_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        DEQFusion(DIM, N, **options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"cells": [None, Narrow(), None]}, ValueError,
         r"cells\[1\]\(z, x\): expected shape \(5, 8\) = the shape of z and of x, got \(5, 7\)"),
        ({"cells": [None, Tuple(), None]}, TypeError,
         r"cells\[1\]\(z, x\): expected a torch.Tensor, got tuple"),
        ({"injection": Sum()}, ValueError,
         r"injection\(xs\): expected shape \(5, 8\) = the shape of each of xs, got \(5,\)"),
        ({"cell_dims": 3}, ValueError,
         "features: expected at least cell_dims=3 dimensions.*got 2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("steps", [None, 2])
def test_wrong_outputs_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], text: str, steps: int | None
) -> None:
    with pytest.raises(error, match=text):
        layer_of(weight_tied_steps=steps, **options)(features())


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: torch.vmap(lambda x: layer([x, x, x]))(torch.stack([x, x])),
        lambda layer, x: torch.func.grad(lambda x: layer([x, x, x]).sum())(x),
    ],
    ids=["vmap", "grad"],
)
def test_transforms_are_refused_by_name(call: Callable[[DEQFusion, Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError, match=r"DEQFusion\(cells=...\) inside torch.func"):
        call(layer_of(), features()[0])


def test_another_cell_put_in_place_of_the_layers_own_is_refused_with_the_remedy() -> None:
    layer = layer_of("convolution")
    layer.cells[1] = ConvCell().double()
    told = (
        r"cells\.1: expected what the layer built there, got ConvCell\. Remedy: DEQFusion\(cells="
    )
    with pytest.raises(TypeError, match=told):
        layer(features("convolution"))
