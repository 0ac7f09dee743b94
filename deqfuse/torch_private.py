"""Everything that deqfuse takes from torch's private API, in one place.

But for the dictionaries of ``nn.Module`` (``_modules``, ``_parameters``, hooks), which code that
looks into modules reads where it does. None of it is promised to stay. Each function says what it
needs the private name for; the tests of ``torch.func``, of fake tensors and of ``torch.compile``
fail where one of them changes its meaning.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, unwrap_if_dead
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

BATCH_NORMS: type[nn.Module] = nn.modules.batchnorm._BatchNorm  # base of all batch norms


def traced(t: Tensor) -> bool:
    """Whether a call is recorded rather than run: ``t`` has a shape and no values to look at.

    torch 2.11 and 2.12 do not say that they compile while they record a backward pass for
    ``backend="aot_eager"``; their tensors do.
    """
    recorded = (FakeTensor, FunctionalTensor)
    return torch.compiler.is_compiling() or t.is_meta or isinstance(t, recorded)


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is running; forward mode by dual tensors is not one."""
    inside: bool = torch._C._are_functorch_transforms_active()
    return inside


def can_look(t: Tensor) -> bool:
    """Whether its numbers may be read: elsewhere one waits for the device, or no graph holds it."""
    return t.device.type == "cpu" and not (traced(t) or in_transform())


def in_transform_or_forward_mode() -> bool:
    """Whether a transform of ``torch.func`` is running, or forward-mode differentiation is on."""
    return in_transform() or forward_ad._current_level >= 0


def values_of(t: Tensor) -> Tensor:
    """``t`` without the wrappers of ``torch.func``, which hide its values."""
    if not in_transform():
        return t
    while is_functorch_wrapped_tensor(t):
        t = get_unwrapped(t)
    return t


def apply_function(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """``function.apply(*inputs)`` outside transforms of ``torch.func``.

    torch's own ``apply`` asks of every tensor whether it is left over from a transform that has
    ended: 11 us for the tensors of a layer. Parameters, nearly all of them, are not asked here.
    """
    plain = [
        unwrap_if_dead(t) if type(t) is not nn.Parameter and isinstance(t, Tensor) else t
        for t in inputs
    ]
    return super(torch.autograd.Function, function).apply(*plain)  # type: ignore[misc]


def scaled(tensors: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
    """``factor * t`` for each of the tensors, in one call: dozens of them take 60 us in Python."""
    if in_transform() or not tensors:  # vmap has no rule for the one call
        return [factor * t for t in tensors]
    result: Sequence[Tensor] = torch._foreach_mul(list(tensors), factor)
    return result


def scale_in_place(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies each of the tensors by ``factor``, in one call."""
    torch._foreach_mul_(list(tensors), factor)


def dynamo_is_loaded() -> bool:
    """Whether the compiler of ``torch.compile`` has been imported; deqfuse does not import it."""
    return "torch._dynamo" in sys.modules


def constant_when_compiled(f: Any) -> Any:
    """``torch.compiler.assume_constant_result``, without loading the compiler at import."""
    f._dynamo_marked_constant = True
    return f


def mark_uncompiled(function: Any, reason: str) -> None:
    """Lets ``torch.compile`` say ``reason`` where it would have to trace into ``function``."""
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = reason
