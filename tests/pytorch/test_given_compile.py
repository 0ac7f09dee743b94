"""Given cells under torch.compile, torch.export and checkpointing: right, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from given_cases import KINDS, TIGHT, N, T, features, layer_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deqfuse import DEQFusion

# Torch looks at .grad of whatever comes out of a graph break, and warns itself.
breaks_graphs = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
STEPS = {"weight_tied_steps": 3}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def results(layer: DEQFusion, call: Any, xs: list[Tensor], **masks: Any) -> list[Tensor]:
    xs = [x.clone().requires_grad_() for x in xs]
    z, info = call(xs, return_info=True, **masks)
    torch.manual_seed(0)
    loss = z.square().sum() + info.jacobian_penalty()
    leaves = [*xs, *layer.parameters()]
    return [z, info.cells.outcome, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


@breaks_graphs
@pytest.mark.parametrize("options", [{}, {"gate": False}, STEPS], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_are_right(kind: str, masked: bool, options: dict[str, Any]) -> None:
    layer, xs = layer_of(kind, on_failure="ignore", **TIGHT, **options), features(kind)
    masks: dict[str, Any] = {}
    if masked:
        present = torch.ones(*xs[0].shape[:-1], N, dtype=torch.bool)
        present[1, ..., 0] = False
        masks = {"present": present}
    compiled = torch.compile(layer, backend="aot_eager")
    given = results(layer, compiled, xs, **masks)
    for a, b in zip(given, results(layer, layer, xs, **masks), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_full_graphs_are_refused_with_the_remedy() -> None:
    compiled = torch.compile(layer_of(), backend="aot_eager", fullgraph=True)
    told = r"DEQFusion\(cells=...\) iterates .* Remedy: leave fullgraph out, or weight_tied_steps"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=told):
        compiled(features())


def test_steps_are_one_graph_and_can_be_exported() -> None:
    layer, xs = layer_of("convolution", **STEPS), features("convolution")
    expected = layer(xs)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(xs), expected)
    program = torch.export.export(layer, (xs,))
    torch.testing.assert_close(program.module()(xs), expected)
    told = r"DEQFusion\(cells=...\) with present= under torch.export"
    present = torch.ones(5, T, N, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=told):
        torch.export.export(layer, (xs,), {"present": present})


def test_export_is_refused_by_name() -> None:
    layer, xs = layer_of(), features()
    told = r"DEQFusion\(cells=...\) under torch.export.*Remedy: weight_tied_steps=k"
    with pytest.raises(NotImplementedError, match=told):
        torch.export.export(layer, (xs,))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"DEQFusion\(cells=...\) iterates"):
        torch.export.export(layer, (xs,), strict=True)
    with pytest.raises(NotImplementedError, match=told):
        layer.to("meta")([x.to("meta") for x in xs])


def test_checkpointing_and_a_second_derivative() -> None:
    layer, xs = layer_of(**TIGHT), [x.requires_grad_() for x in features()]
    grads = [
        torch.autograd.grad(f(xs).square().sum(), xs)
        for f in (layer, lambda xs: checkpoint(layer, xs, use_reentrant=False))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(layer(xs).square().sum(), xs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()
