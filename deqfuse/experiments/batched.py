"""Many small models of the synthetic study trained at once: every product is one ``bmm``.

Model ``t`` of a batch sees only its own data (n, ...) and has only its own parameters, so this is
the same as training them one after another (``tests/experiments/test_experiments_models.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from deqfuse import DEQ, Anderson, DEQFusion, Implicit

__all__ = ["MODELS", "BatchedModel", "ModelName", "initial_parameters"]

ModelName = Literal["base", "pro 2", "pro 3", "pro equilibrium", "deq", "deq penalised"]
MODELS: tuple[ModelName, ...] = ("base", "pro 2", "pro 3", "pro equilibrium", "deq")
VIEWS = 2
JACOBIAN_WEIGHT = 20.0  # of "deq penalised": the paper's
SOLVER = Anderson(tol=1e-3, max_iter=30)  # of "pro equilibrium"
ADJOINT = Implicit(solver="anderson", tol=1e-3, max_iter=30)


class BatchedModel(nn.Module):
    """T regression models: per view two layers, concatenation, a third layer.

    ``"pro R"`` projects the concatenation back to the inputs and applies the first two layers R
    times in all, ``"pro equilibrium"`` to their equilibrium, and ``"deq"`` replaces the
    concatenation by DEQ Fusion of the two encodings; ``"deq penalised"`` adds its Jacobian penalty.

    Args:
        name: which model.
        seeds: one per model; models of the same seed share their initial values as far as they
            have the same parameters.
        dim: features of each view.
        width: of the hidden layers.
    """

    def __init__(self, name: ModelName, seeds: Sequence[int], dim: int, width: int) -> None:
        super().__init__()
        self.name, self.width = name, width
        drawn = [initial_parameters(seed, name, dim, width) for seed in seeds]
        self.shared = nn.ParameterDict(
            {key: nn.Parameter(torch.stack([d[key] for d in drawn])) for key in drawn[0]}
        )
        self.layers = nn.ModuleList()
        self.penalty: Tensor | None = None  # of the last forward pass in training, over all models
        if name.startswith("deq"):
            for seed in seeds:
                torch.manual_seed(seed)
                self.layers.append(
                    DEQFusion(width, VIEWS, injection_norm=False, on_failure="ignore")
                )
        self.deq: DEQ | None = None
        if name == "pro equilibrium":
            # Rows are few numbers wide: GMRES would spend its time on its basis.
            self.deq = DEQ(
                self._again,
                solver=SOLVER,
                adjoint=ADJOINT,
                on_failure="ignore",
            )
        self._views: Sequence[Tensor] = ()

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Per view (T, n, dim) -> (T, n), and per model and row whether its solve converged."""
        count, rows = views[0].shape[:2]
        if self.layers:
            encodings = self._encode(views, None)
            fused, infos = zip(
                *(
                    layer([x[t] for x in encodings], return_info=True)
                    for t, layer in enumerate(self.layers)
                ),
                strict=True,
            )
            if self.name == "deq penalised" and self.training:
                each = torch.stack([info.jacobian_penalty() for info in infos])
                self.penalty = JACOBIAN_WEIGHT * each.sum()
            return self._head(torch.stack(fused)), torch.stack([i.converged for i in infos])
        if self.deq is not None:
            start = views[0].new_zeros(count * rows, VIEWS * self.width)
            self._views = views
            z, info = self.deq(start)
            return self._head(z.view(count, rows, -1)), info.converged.view(count, rows)
        context = torch.cat(self._encode(views, None), dim=-1)
        for _ in range(int(self.name[-1]) - 1 if self.name != "base" else 0):
            context = torch.cat(self._encode(views, context), dim=-1)
        return self._head(context), None

    def _again(self, z: Tensor) -> Tensor:
        """One application of the model to contexts (T n, 2 width); rows do not see each other."""
        count = self._views[0].shape[0]
        context = z.view(count, -1, z.shape[-1])
        return torch.cat(self._encode(self._views, context), dim=-1).flatten(0, 1)

    def _encode(self, views: Sequence[Tensor], context: Tensor | None) -> list[Tensor]:
        p, encodings = self.shared, []
        for i, view in enumerate(views):
            x = view if context is None else view + context @ p[f"back{i}"]
            hidden = torch.relu(torch.baddbmm(p[f"bias1_{i}"], x, p[f"weight1_{i}"]))
            encodings.append(torch.relu(torch.baddbmm(p[f"bias2_{i}"], hidden, p[f"weight2_{i}"])))
        return encodings

    def _head(self, fused: Tensor) -> Tensor:
        p = self.shared
        return torch.baddbmm(p["bias3"], fused, p["weight3"]).squeeze(-1)


def initial_parameters(seed: int, name: ModelName, dim: int, width: int) -> dict[str, Tensor]:
    """One model's parameters, drawn as ``nn.Linear`` draws; weights are (in, out), biases (1, out).

    What all models have is drawn first, so it does not depend on ``name``.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(fan_in: int, *shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) / fan_in**0.5

    values: dict[str, Tensor] = {}
    for i in range(VIEWS):
        values[f"weight1_{i}"], values[f"bias1_{i}"] = draw(dim, dim, width), draw(dim, 1, width)
        values[f"weight2_{i}"] = draw(width, width, width)
        values[f"bias2_{i}"] = draw(width, 1, width)
    fused = width if name.startswith("deq") else VIEWS * width
    values["weight3"], values["bias3"] = draw(fused, fused, 1), draw(fused, 1, 1)
    if name.startswith("pro"):
        for i in range(VIEWS):
            values[f"back{i}"] = draw(VIEWS * width, VIEWS * width, dim)
    return values
