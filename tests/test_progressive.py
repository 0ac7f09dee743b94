"""``ProFusion``: the given model at one step, the recurrence, its equilibrium and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
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


@pytest.mark.parametrize("sites", SITES, ids=["input", "inside"])
@pytest.mark.parametrize("inject", ["add", "concat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_step_is_the_given_model_bit_for_bit(
    inject: str, sites: list[str] | None, dtype: torch.dtype
) -> None:
    model, xs = build(steps=1, inject=inject, sites=sites, dtype=dtype), features(dtype)
    found, expected = model(xs), base(model, xs)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    g = torch.randn_like(found)
    wanted = list(nn.ModuleList([model.encoders, model.fusion, model.head]).parameters())  # type: ignore[list-item]
    for a, b in zip(
        torch.autograd.grad(found, wanted, g), torch.autograd.grad(expected, wanted, g), strict=True
    ):
        assert torch.equal(a, b)


def test_first_of_many_steps_is_the_given_model_too() -> None:
    for inject in ("add", "concat"):
        model, xs = build(steps=3, inject=inject), features()
        _, contexts = model(xs, return_contexts=True)
        assert contexts.shape == (3, B, K)
        assert torch.equal(model.head(contexts[0]), base(model, xs))  # type: ignore[misc]
        assert not torch.equal(contexts[1], contexts[0])
