"""Short cuts for calls that take some 100 us, around ``nn.Module``'s attributes and around checks.

A small layer looks up dozens of parameters and checks every feature at each call; the long way
costs as much as its solve. Each function here recognises the ordinary case and returns None for
everything else, which the caller then looks at the long way. Nothing is decided or refused here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deqfuse import checks
from deqfuse.backends.maps import GROUP_NORM_EPS


def parameter(module: nn.Module, name: str) -> Tensor:
    """``module.name`` at a third of the cost; whatever it is where it is not a plain parameter."""
    held = module._parameters
    return held[name] if name in held else getattr(module, name)  # type: ignore[return-value]


def plain_weights_and_biases(
    module: nn.Module, parts: Sequence[tuple[str, type[nn.Module]]]
) -> list[Tensor] | None:
    """Weight and bias of each named part, if all of them are as they were built.

    Read where ``nn.Module`` keeps them: its attribute access takes ten times as long.
    """
    held, num_groups = module._modules, module.num_groups
    flat: list[Tensor] = []
    try:
        for name, kind in parts:
            part = held[name]
            own = part.__dict__
            parameters = own["_parameters"]
            bias = parameters["bias"]
            if (
                type(part) is not kind
                or "forward" in own
                or own["_forward_hooks"]
                or bias is None
                or (
                    kind is nn.GroupNorm
                    and (own["eps"] != GROUP_NORM_EPS or own["num_groups"] != num_groups)
                )
            ):
                return None
            flat += parameters["weight"], bias
    except KeyError:  # parametrised, pruned, replaced
        return None
    return flat


def plain_lead(
    features: Sequence[Tensor], widths: Sequence[int], like: Tensor | None
) -> torch.Size | None:
    """Leading dimensions of the features, if they are plain dense tensors that agree.

    Args:
        features: one tensor (..., width) per modality, or anything else.
        widths: expected last dimension of each.
        like: a parameter, whose dtype and device the features must have.
    """
    if like is None or type(features) not in (list, tuple) or len(features) != len(widths):
        return None
    dtype, device, lead = like.dtype, like.device, None
    for feature, width in zip(features, widths, strict=True):
        if (
            type(feature) is not Tensor
            or feature.dtype is not dtype
            or feature.device != device
            or feature.layout is not torch.strided
            or feature.is_nested
        ):
            return None
        shape = feature.shape
        lead = shape[:-1] if lead is None else lead
        if shape != (*lead, width):
            return None
    return lead if dtype in checks.FLOATING else None
