"""Parts of a cell are read and not called: what follows a part's own forward is refused."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as legacy_spectral_norm
from torch.nn.utils import weight_norm as legacy_weight_norm

from deqfuse import DEQFusion, PurifyCombine, ResidualCell
from deqfuse.backends.maps import GROUP_NORM_EPS

DIM, N = 8, 2


def make(**options) -> DEQFusion:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return DEQFusion(DIM, N, num_groups=2, on_failure="ignore", **options)


def draw() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, DIM, generator=generator) for _ in range(N)]


class Adapted(nn.Module):
    """A Linear with something beside it, as adapters for fine-tuning are written."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(DIM, DIM, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.down(x)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Quiet(nn.Linear):
    """Another initialisation and nothing else."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def old_weight_norm(part: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        legacy_weight_norm(part)


HOOKS = {
    "weight_norm": old_weight_norm,
    "spectral_norm": legacy_spectral_norm,
    "prune": lambda part: prune.l1_unstructured(part, "weight", amount=0.5),
}
WHERE = {
    "cells.1.linear2": lambda layer: layer.cells[1].linear2,
    "combine.gate": lambda layer: layer.combine.gate,
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("hook", HOOKS)
def test_weights_recomputed_by_hooks_are_refused(hook, where) -> None:  # type: ignore[no-untyped-def]
    layer = make()
    HOOKS[hook](WHERE[where](layer))
    remedy = "torch.nn.utils.parametrizations.weight_norm or spectral_norm"
    with pytest.raises(TypeError, match=rf"^{re.escape(where)}\.weight: .*hook.*{remedy}"):
        layer(draw())
    with pytest.raises(TypeError, match=r"^gate\.weight|^linear2\.weight"):
        (layer.cells[1] if "cells" in where else layer.combine).flat()


def test_pruning_made_permanent_is_seen() -> None:
    layer, xs = make(), draw()
    before = layer(xs)
    prune.l1_unstructured(layer.cells[0].linear2, "weight", amount=0.9)
    prune.remove(layer.cells[0].linear2, "weight")
    assert not torch.equal(layer(xs), before)


@pytest.mark.parametrize("options", [{}, {"weight_tied_steps": 2}, {"gate": False}], ids=str)
@pytest.mark.parametrize("adapt", [Adapted, lambda base: Doubled(DIM, DIM)], ids=["own", "sub"])
def test_parts_with_a_forward_of_their_own_are_refused(adapt, options) -> None:  # type: ignore[no-untyped-def]
    layer = make(**options)
    layer.cells[0].linear1 = adapt(layer.cells[0].linear1)
    with pytest.raises(TypeError, match=r"^cells\.0\.linear1: expected torch\.nn\.Linear.*got "):
        layer(draw())


def test_a_forward_put_on_the_object_is_refused() -> None:
    for part, name in ((WHERE["combine.gate"], "combine.gate"), (lambda m: m.combine.norm, "")):
        layer = make()
        part(layer).forward = lambda x: x
        with pytest.raises(TypeError, match=name or r"combine\.norm: expected torch.nn.GroupNorm"):
            layer(draw())


class Louder(ResidualCell):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 2 * super().forward(z, x)


def test_cells_with_a_forward_of_their_own_are_refused() -> None:
    layer = make()
    layer.cells[1] = Louder(DIM, num_groups=2)
    with pytest.raises(
        TypeError, match=r"^cells\.1\.forward: .*Louder.*DEQFusion\(cells=.*deqfuse\.DEQ "
    ):
        layer(draw())


@pytest.mark.parametrize(("name", "value"), [("eps", 10.0), ("num_groups", 4)])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("where", ["cells.0.norm1", "cells.1.norm3", "combine.norm"])
def test_other_norms_are_refused(where, gate, name, value) -> None:  # type: ignore[no-untyped-def]
    layer = make(gate=gate)
    layer(draw())  # and not on first use only
    setattr(layer.get_submodule(where), name, value)
    with pytest.raises(ValueError, match=rf"norm\d?: .*num_groups=2.*{name}={value:g}") as said:
        layer(draw())
    assert not gate or str(said.value).startswith(f"{where}: ")


def test_parts_without_bias_and_quantised_ones_are_named() -> None:
    layer = make()
    layer.cells[1].linear1 = nn.Linear(DIM, DIM, bias=False)
    with pytest.raises(TypeError, match=r"^cells\.1\.linear1\.bias: .*NoneType.*bias=True"):
        layer(draw())
    layer = make()
    layer.combine.norm = nn.GroupNorm(2, DIM, affine=False)
    with pytest.raises(TypeError, match=r"^combine\.norm\.weight: .*NoneType.*affine=True"):
        layer(draw())


def test_plain_replacements_are_read() -> None:
    layer, xs = make(), draw()
    expected = layer(xs)
    for cell in layer.cells:
        plain, norm = nn.Linear(DIM, DIM), nn.GroupNorm(2, DIM, eps=GROUP_NORM_EPS)
        plain.load_state_dict(cell.linear2.state_dict())
        cell.linear2, cell.norm3 = plain, norm
    assert torch.equal(layer(xs), expected)
    layer.cells[0].linear2 = Quiet(DIM, DIM)
    assert not torch.equal(layer(xs), expected)


def test_tensors_in_the_place_of_parameters_are_read() -> None:
    """What a hypernetwork, or a wrapper that shards parameters, puts there."""
    layer, xs = make(), draw()
    expected = layer(xs)
    part = layer.cells[0].linear1
    made = part.weight.detach().clone().requires_grad_()
    del part.weight
    part.weight = made
    z = layer(xs)
    assert torch.equal(z, expected)
    z.square()[:, 0].sum().backward()
    assert made.grad.abs().sum() > 0


def test_parametrisations_train() -> None:
    layer, xs = make(), draw()
    parametrizations.weight_norm(layer.cells[0].linear2)
    parametrizations.spectral_norm(layer.combine.fuse)
    optimizer, seen = torch.optim.SGD(layer.parameters(), lr=0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        z = layer(xs)
        seen.append(z.detach())
        z[:, 0].square().sum().backward()
        optimizer.step()
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_blocks_of_their_own_refuse_too() -> None:
    cell, combine, x = ResidualCell(DIM), PurifyCombine(DIM, N), torch.randn(3, DIM)
    old_weight_norm(cell.linear1)
    combine.norm.eps = 1e-3
    with pytest.raises(TypeError, match=r"^linear1\.weight: "):
        cell(x, x)
    with pytest.raises(ValueError, match=r"^norm: .*eps=0\.001"):
        combine(x, torch.stack([x, x]), x)


def test_compiled_layers_refuse_when_they_are_traced() -> None:
    layer = make()
    layer.cells[0].norm1.num_groups = 4  # not eps: comparing it would cost a second dynamic graph
    with pytest.raises(Exception, match=r"cells\.0\.norm1: expected GroupNorm with num_groups=2"):
        torch.compile(layer, backend="eager", fullgraph=True)(draw())
