"""A small late-fusion model and the features it takes, for the tests of ``ProFusion``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deqfuse import (
    Anderson,
    Implicit,
    ProFusion,
)

B, K = 5, 4
WIDTHS = (6, 3)
TIGHT = Anderson(tol=1e-12, max_iter=200)
EXACT = Implicit(tol=1e-12, max_iter=200)
SITES = (None, ["2", "0"])


class Join(nn.Module):
    """Late fusion in MultiBench's convention; as a tuple, something may follow the fused tensor."""

    def __init__(self, width: int, extra: bool = False) -> None:
        super().__init__()
        self.linear, self.extra = nn.Linear(width, K), extra

    def forward(self, xs: Sequence[Tensor]) -> Any:
        assert isinstance(xs, list)
        fused = torch.tanh(self.linear(torch.cat(xs, dim=-1)))
        return (fused, "extra") if self.extra else fused


def encoders(dropout: float = 0.0) -> list[nn.Module]:
    first = [nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5), nn.Tanh()]
    return [nn.Sequential(*first), nn.Sequential(nn.Linear(3, 5), nn.Dropout(dropout), nn.Tanh())]


def build(*, dropout: float = 0.0, dtype: torch.dtype = torch.float64, **options: Any) -> ProFusion:
    torch.manual_seed(0)
    head = nn.Linear(K, 2)
    if options.get("sites"):
        options["sites"] = ["3", "0"]
    return ProFusion(encoders(dropout), Join(10), K, head=head, **options).to(dtype)


def features(dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, width, generator=generator, dtype=dtype) for width in WIDTHS]


def base(model: ProFusion, xs: Sequence[Tensor]) -> Tensor:
    """The given late-fusion model, as its owner would write it."""
    out = model.fusion([encoder(x) for encoder, x in zip(model.encoders, xs, strict=True)])
    return model.head(out[0] if isinstance(out, tuple) else out)  # type: ignore[misc]


def lively(model: ProFusion) -> ProFusion:
    """Back-projections large enough that the context matters, the map still a contraction."""
    with torch.no_grad():
        for v in model.back_projections:
            v.weight.mul_(2.5)  # type: ignore[operator, union-attr]
    return model


def leaves(model: ProFusion, xs: Sequence[Tensor]) -> list[Tensor]:
    own = [model.encoders, model.fusion, model.back_projections, model.extra_columns]
    return [*(p for part in own for p in part.parameters()), *xs]  # type: ignore[union-attr]
