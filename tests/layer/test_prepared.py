"""``DEQFusion.prepare()``: the layer's own answers, and every use that would give others."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deqfuse import Anderson, BackendUnavailable, DEQFusion, Outcome, Unrolled
from deqfuse.backends import load
from deqfuse.nn import PreparedFusion

DIM, N = 24, 2
BACKENDS = [name for name in ("reference", "cpu") if load(name).unavailable() is None]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_variant = pytest.mark.parametrize("variant", ["paper", "released", "released-mmimdb"])


def layer(**options: Any) -> DEQFusion:
    torch.manual_seed(0)
    return DEQFusion(DIM, N, **{"num_groups": 3, **options}).eval()


def features(*lead: int, widths: tuple[int, ...] = (DIM,) * N, dtype: Any = None) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(*lead, width, dtype=dtype) for width in widths]


def assert_same(prepared: PreparedFusion, fusion: DEQFusion, xs: list[Tensor], **call: Any) -> None:
    flags = {"return_info": True, "return_cells": True}
    with torch.no_grad():
        z, cells, info = prepared(xs, **call, **flags)
        expected, expected_cells, expected_info = fusion(xs, **call, **flags)
        plain = prepared(xs, **call)
    for given, wanted in ((z, expected), (plain, expected), (cells, expected_cells)):
        assert given.dtype is wanted.dtype
        assert torch.equal(given, wanted)
    assert info.backend == expected_info.backend
    assert torch.equal(info.outcome, expected_info.outcome)
    assert torch.equal(info.nfe, expected_info.nfe)
    assert torch.equal(info.residual, expected_info.residual)
    assert info.spectral_radius().shape == expected_info.spectral_radius().shape


# ---- answers -------------------------------------------------------------------------------------


@each_backend
@each_variant
@pytest.mark.parametrize("lead", [(1,), (7,), (40,), (2, 3), (), (0,)], ids=str)
def test_answers_are_the_layers_own(backend: str, variant: Any, lead: tuple[int, ...]) -> None:
    fusion = layer(backend=backend, variant=variant)
    xs = features(*lead)
    if lead == (0,):
        assert fusion.prepare()(xs).shape == (0, DIM)
    else:
        assert_same(fusion.prepare(), fusion, xs)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_dtype(backend: str, dtype: torch.dtype) -> None:
    fusion = layer(backend=backend, solver=Anderson(tol=1e-2)).to(dtype)
    assert_same(fusion.prepare(), fusion, features(3, dtype=dtype))


@each_backend
def test_projections_and_injection_norm(backend: str) -> None:
    fusion = layer(backend=backend, in_dims=(5, 9), injection_norm=True)
    assert_same(fusion.prepare(), fusion, features(4, widths=(5, 9)))


@each_backend
@pytest.mark.parametrize("in_dims", [None, (5, 9)], ids=str)
def test_rows_that_lack_modalities(backend: str, in_dims: tuple[int, ...] | None) -> None:
    fusion = layer(backend=backend, in_dims=in_dims)
    xs, present = features(9, widths=in_dims or (DIM,) * N), torch.rand(9, N) > 0.4
    present[:, 0] |= ~present.any(1)
    xs = [torch.where(here[:, None], x, torch.nan) for x, here in zip(xs, present.T, strict=True)]
    assert_same(fusion.prepare(), fusion, xs, present=present)


def test_parametrised_weights_are_those_of_the_moment() -> None:
    fusion = layer()
    parametrizations.weight_norm(fusion.cells[0].linear1)
    assert_same(fusion.prepare(), fusion, features(3))


@pytest.mark.filterwarnings("ignore::deqfuse.ConvergenceWarning")
@each_backend
def test_failures_are_reported_as_ever(backend: str) -> None:
    fusion = layer(backend=backend, solver=Anderson(tol=1e-12, max_iter=2, rescue=False))
    _, info = fusion.prepare()(features(3), return_info=True)
    assert (info.fuse.outcome == Outcome.MAX_ITER).all()
    fusion.on_failure = "raise"
    with pytest.raises(RuntimeError, match="rows of the modality cells did not converge"):
        fusion.prepare()(features(3))


def test_nothing_has_a_gradient() -> None:
    xs = [x.requires_grad_() for x in features(3)]
    assert not layer().prepare()(xs).requires_grad


def test_answers_are_the_callers_to_write_into() -> None:
    serve, xs = layer().prepare(), features(3)
    first = serve(xs)
    kept = first.clone()
    first.zero_()
    assert torch.equal(serve(xs), kept)


def test_calls_in_inference_mode() -> None:
    fusion, xs = layer(), features(3)
    with torch.inference_mode():
        serve = fusion.prepare()
        inside = serve(xs)
    assert torch.equal(serve(xs), inside)


# ---- refusals ------------------------------------------------------------------------------------


def _step(fusion: DEQFusion) -> None:
    with torch.no_grad():
        fusion.cells[1].linear2.weight.mul_(2)


def _load(fusion: DEQFusion) -> None:
    fusion.load_state_dict(fusion.state_dict())


def _replace(fusion: DEQFusion) -> None:
    fusion.cells[1].linear2.weight = nn.Parameter(fusion.cells[1].linear2.weight.detach().clone())


def _data(fusion: DEQFusion) -> None:
    fusion.cells[1].linear2.weight.data = fusion.cells[1].linear2.weight.data.clone()


CHANGES = {
    "an in-place change": (_step, "cells.1.linear2.weight"),
    "load_state_dict": (_load, "modality_weights"),
    "another parameter": (_replace, "cells.1.linear2.weight"),
    "other memory": (_data, "cells.1.linear2.weight"),
    "another dtype": (DEQFusion.double, "modality_weights"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_changed_are_refused_by_name(change: str) -> None:
    fusion, xs = layer(), features(3)
    serve = fusion.prepare()
    serve(xs)
    apply, name = CHANGES[change]
    apply(fusion)
    with pytest.raises(RuntimeError, match=rf"^{re.escape(name)}: expected .*layer\.prepare\(\)"):
        serve(xs)
    xs = [x.to(fusion.modality_weights.dtype) for x in xs]
    assert torch.equal(fusion.prepare()(xs), fusion(xs))


def test_a_projection_that_changed_is_refused() -> None:
    fusion, xs = layer(in_dims=(5, 9)), features(3, widths=(5, 9))
    serve = fusion.prepare()
    with torch.no_grad():
        fusion.projections[0].bias.add_(1)
    with pytest.raises(RuntimeError, match=r"^projections\.0\.bias: expected"):
        serve(xs)


def test_training_mode_with_dropout_is_refused_at_both_times() -> None:
    fusion = layer(dropout=0.1)
    serve = fusion.prepare()
    serve(features(3))
    fusion.train()
    for call in (fusion.prepare, lambda: serve(features(3))):
        with pytest.raises(ValueError, match=r"^dropout: expected evaluation mode.*layer\.eval"):
            call()
    layer().train().prepare()(features(3))  # nothing is drawn


class Given(nn.Module):
    """A cell of the user's own."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.1 * z + x


@pytest.mark.parametrize(
    "options",
    [
        {"cells": [Given(), None]},
        {"cell": "identity"},
        {"combine": "sum"},
        {"combine": "weighted_sum"},
        {"gate": False},
        {"weight_tied_steps": 3},
        {"adjoint": Unrolled()},
    ],
    ids=str,
)
def test_what_is_not_one_operator_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^prepare: expected .* Remedy: call the layer itself"):
        layer(**options).prepare()


def test_parameters_without_versions_are_refused() -> None:
    with torch.inference_mode():
        fusion = layer()
    with pytest.raises(ValueError, match=r"^prepare: .*modality_weights.*inference_mode"):
        fusion.prepare()


def test_a_backend_that_cannot_is_refused_when_preparing() -> None:
    with pytest.raises(BackendUnavailable, match="cuda"):
        layer(backend="cuda").prepare()


def test_transforms_and_compilers_are_refused() -> None:
    serve, xs = layer().prepare(), features(4, 3)
    with pytest.raises(TypeError, match=r"^features: expected plain tensors"):
        torch.func.vmap(lambda *each: serve(each))(*xs)


def test_features_are_checked_as_ever() -> None:
    serve = layer().prepare()
    with pytest.raises(ValueError, match=r"^features: expected a sequence of num_modalities=2"):
        serve(features(3)[:1])
    with pytest.raises(ValueError, match=r"^present: expected at least one modality"):
        serve(features(3), present=torch.zeros(3, N, dtype=torch.bool))
