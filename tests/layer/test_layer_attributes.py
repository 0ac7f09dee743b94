"""Construction elsewhere, drawing again, attributes that change later, and how a layer prints."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from deqfuse import Anderson, DEQFusion, Picard, PurifyCombine, ResidualCell

DIM, N = 64, 3
OPTIONS = [
    {}, {"gate": False}, {"combine": "sum"}, {"combine": "weighted_sum"}, {"in_dims": (5, 6, 7)},
    {"variant": "released"}, {"init": "torch"}, {"cell": "identity", "dropout": 0.3},
]  # fmt: skip


def draw(rows: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, DIM, generator=generator) for _ in range(N)]


def moments(layer: nn.Module) -> dict[str, tuple[float, float]]:
    return {
        name: (p.detach().mean().item(), p.detach().std(correction=0).item())
        for name, p in layer.named_parameters()
    }


# ---- drawing again -------------------------------------------------------------------------------


@pytest.mark.parametrize("children_last", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_deferred_initialisation(options, children_last) -> None:  # type: ignore[no-untyped-def]
    """``to_empty`` and every module's ``reset_parameters``, as sharded training does it."""
    torch.manual_seed(0)
    expected = DEQFusion(DIM, N, **options)
    with torch.device("meta"):
        layer = DEQFusion(DIM, N, **options)
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(math.nan)  # what a reset leaves out shows
    modules = list(layer.modules())
    for module in modules if children_last else reversed(modules):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    found, right = moments(layer), moments(expected)
    assert found.keys() == right.keys()
    for name, (mean, std) in right.items():
        count = expected.get_parameter(name).numel()
        # Two draws: the spread of a mean, and that of a standard deviation, each of `count` values.
        assert abs(found[name][0] - mean) <= 7 * std / math.sqrt(count), name
        assert abs(found[name][1] - std) <= 7 * std / math.sqrt(count), name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_reset_with_the_same_seed_is_a_new_layer(options) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(3)
    layer = DEQFusion(DIM, N, **options)
    fresh = {name: p.clone() for name, p in layer.state_dict().items()}
    for p in layer.parameters():
        nn.init.constant_(p, math.nan)
    torch.manual_seed(3)
    layer.reset_parameters()
    assert all(torch.equal(p, fresh[name]) for name, p in layer.state_dict().items())


def test_the_default_draw_is_pinned() -> None:
    """Committed results depend on it: torch's own draws, then the contractive ones."""
    torch.manual_seed(0)
    layer = DEQFusion(8, 2)
    torch.manual_seed(0)
    for cell in layer.cells:
        linear1, linear2 = nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.normal_(linear2.weight, std=0.1 / math.sqrt(8))
        assert torch.equal(cell.linear1.weight, linear1.weight)
        assert torch.equal(cell.linear2.weight, linear2.weight)
        assert torch.equal(cell.linear2.bias, linear2.bias)
    gate, fuse = nn.Linear(8, 8), nn.Linear(8, 8)
    nn.init.normal_(fuse.weight, std=0.1 / math.sqrt(8))
    nn.init.normal_(gate.weight, std=0.25 / (2 * math.sqrt(8)))
    for found, expected in ((layer.combine.gate, gate), (layer.combine.fuse, fuse)):
        assert torch.equal(found.weight, expected.weight)
        assert torch.equal(found.bias, expected.bias)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_factory_arguments(options) -> None:  # type: ignore[no-untyped-def]
    layer = DEQFusion(DIM, N, device="meta", dtype=torch.float64, **options)
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
    for block in (ResidualCell(8, device="meta", dtype=torch.bfloat16),
                  PurifyCombine(8, 2, device="meta", dtype=torch.bfloat16)):  # fmt: skip
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in block.parameters())


# ---- attributes ----------------------------------------------------------------------------------


def test_dropout_may_change_after_construction() -> None:
    torch.manual_seed(0)
    layer, xs = DEQFusion(DIM, N), draw()
    plain = layer(xs)
    layer.dropout = 0.5
    assert not torch.equal(layer(xs), plain)
    assert torch.equal(layer.eval()(xs), plain)
    layer.train().dropout = 0
    assert torch.equal(layer(xs), plain)
    for wrong, error in ((1.0, ValueError), (-0.1, ValueError), ("no", TypeError)):
        with pytest.raises(error, match=r"^dropout: expected"):
            layer.dropout = wrong
    other = DEQFusion(DIM, N, combine="sum")
    with pytest.raises(ValueError, match="dropout and gate belong to combine='purify'"):
        other.dropout = 0.5


def test_a_gate_is_a_flag() -> None:
    with pytest.raises(TypeError, match=r"^gate: expected True or False, got 'no'"):
        PurifyCombine(8, 2, gate="no")


def test_printed_layers_say_what_they_do() -> None:
    text = DEQFusion(8, 2, gate=False, dropout=0.25, backend="reference").extra_repr()
    for part in ("cell='residual'", "combine='purify'", "gate=False", "dropout=0.25",
                 "injection_norm=True", "backend='reference'", "solver=Anderson(",
                 "on_failure='warn'"):  # fmt: skip
        assert part in text
    tied = DEQFusion(8, 2, weight_tied_steps=3, solver=Picard()).extra_repr()
    assert "weight_tied_steps=3" in tied
    assert "Picard" not in tied
    assert "gate" not in DEQFusion(8, 2, combine="sum", solver=Anderson()).extra_repr()
