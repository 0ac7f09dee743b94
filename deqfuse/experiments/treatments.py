"""What may keep training convergent: the recipes that the stability study compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from deqfuse import DEQFusion, SolveInfo
from deqfuse.experiments.training import Recipe

__all__ = ["TREATMENTS", "Treated", "Treatment", "radius_penalty", "treat"]

POWER_STEPS = 8  # products with J^T before the one that is penalised


@dataclass(frozen=True)
class Treatment:
    """One way to train the layer; the default is to do nothing.

    Args:
        label: its name in tables.
        jacobian: weight of the Jacobian penalty.
        radius: weight of :func:`radius_penalty`.
        norm: spectral norm of every W_2, W_f and W_a: "free"; "one", as torch's parametrisation has
            it; "drawn", held at what the initialisation drew.
        rate: learning rate of the layer, of that of the rest.
        gain: initial weight of the GroupNorms that give the states z_i and z_f, then trained.
    """

    label: str
    jacobian: float = 0.0
    radius: float = 0.0
    norm: Literal["free", "one", "drawn"] = "free"
    rate: float = 1.0
    gain: float = 1.0


TREATMENTS = {
    "none": Treatment("nothing"),
    "jacobian 2": Treatment("Jacobian penalty, weight 2", jacobian=2.0),
    "jacobian 20": Treatment("Jacobian penalty, weight 20", jacobian=20.0),
    "jacobian 100": Treatment("Jacobian penalty, weight 100", jacobian=100.0),
    "radius 1": Treatment("radius penalty, weight 1", radius=1.0),
    "radius 10": Treatment("radius penalty, weight 10", radius=10.0),
    "norm one": Treatment("spectral norm 1 of W2, Wf, Wa", norm="one"),
    "norm drawn": Treatment("spectral norm of W2, Wf, Wa as drawn", norm="drawn"),
    "rate": Treatment("a tenth of the learning rate", rate=0.1),
    "gain": Treatment("output gain 0.5 at first", gain=0.5),
}


@dataclass(frozen=True)
class Treated(Recipe):
    """A recipe for training with a treatment; parts of it that concern weights: :func:`treat`."""

    jacobian_weight: float = 0.0
    radius_weight: float = 0.0
    layer_rate: float = 1.0  # of the layer's learning rate over that of the rest

    def parameters(self, model: nn.Module) -> list[dict[str, Any]]:
        layer = [*model.fusion.parameters()]  # type: ignore[union-attr]
        known = {id(p) for p in layer}
        rest = [p for p in model.parameters() if id(p) not in known]
        return [{"params": rest}, {"params": layer, "lr": self.layer_rate * self.learning_rate}]

    def penalty(self, info: SolveInfo) -> Tensor | float:
        total = super().penalty(info)
        return total + self.radius_weight * radius_penalty(info) if self.radius_weight else total


def radius_penalty(info: SolveInfo, steps: int = POWER_STEPS) -> Tensor:
    """Mean over blocks and rows of ``|J^T v|^2``, about the square of the spectral radius.

    v of length 1 is where ``steps`` power iterations with J^T have come to, each row's own: near
    the dominant left eigenvector where a real eigenvalue is, otherwise in the plane of the dominant
    pair. Like the equilibrium it is held constant, so that the gradient shortens what J^T makes of
    v; that is the gradient of the radius only where left and right eigenvectors agree.

    Args:
        info: of a whole layer's solve without a mask of modalities.
        steps: products with J^T before the one that is penalised, at least 1.

    Returns:
        Scalar of shape (), differentiable as ``info.jacobian_penalty()`` is.
    """
    assert info.blocks is not None
    assert info.penalty is not None
    found = []
    for block in info.blocks:
        solved = block()
        assert solved.linearize is not None
        v = _dominant(solved.linearize(), solved.z, steps)
        found.append(v.reshape(-1, *v.shape[-2:]))
    probes = torch.cat(found)[None]  # (1, N + 1, B, d)
    # The operator divides by d, as suits Gaussian probes, whose mean square length is d.
    return info.penalty(1, probes * probes.shape[-1] ** 0.5)


@torch.no_grad()
def _dominant(vjp: Callable[[Tensor], Tensor], z: Tensor, steps: int) -> Tensor:
    v = torch.randn_like(z)
    for _ in range(steps):
        v = vjp(v)
        v = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(1e-30)
    return v


def treat(layer: DEQFusion, treatment: Treatment) -> None:
    """Changes the layer's weights before training: norms held, gains at their start."""
    assert layer.combine is not None
    assert layer.combine.gate is not None
    if treatment.gain != 1.0:
        for norm in (*(cell.norm3 for cell in layer.cells), layer.combine.norm):
            nn.init.constant_(norm.weight, treatment.gain)  # type: ignore[arg-type, union-attr]
    if treatment.norm == "free":
        return
    for part in (*(cell.linear2 for cell in layer.cells), layer.combine.fuse, layer.combine.gate):
        assert isinstance(part, nn.Linear)
        drawn = float(torch.linalg.matrix_norm(part.weight.detach(), 2))
        parametrizations.spectral_norm(part)
        if treatment.norm == "drawn":
            parametrize.register_parametrization(part, "weight", _Times(drawn))


class _Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight
