"""The Linear and GroupNorm modules inside a cell: how they are drawn, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deqfuse.backends.maps import GROUP_NORM_EPS
from deqfuse.nn.fast import plain_weights_and_biases


class CellLinear(nn.Linear):
    """A square Linear that keeps its standard deviation when its parameters are drawn again.

    ``modules()`` gives parents first: what a cell drew for its Linear, the Linear's own
    ``reset_parameters`` would undo.
    """

    std: float | None = None  # of the weight; torch's default without

    def __init__(self, dim: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(dim, dim, device=device, dtype=dtype)

    def contract(self, std: float) -> None:
        """Draws the weight with this standard deviation, now and at every reset."""
        self.std = std
        nn.init.normal_(self.weight, std=std)

    def reset_parameters(self) -> None:
        """As torch does; then the weight with the standard deviation, where there is one."""
        super().reset_parameters()
        if self.std is not None:
            self.contract(self.std)


def flat_parameters(modules: Mapping[str, Any], prefix: str = "") -> list[Tensor]:
    """What ``flat()`` of each of these modules gives, in one list; its errors name the module."""
    flat: list[Tensor] = []
    for name, module in modules.items():
        try:
            flat += module.flat()
        except (TypeError, ValueError) as error:  # of its text Dynamo knows the arguments only
            raise type(error)(f"{prefix}{name}.{error.args[0]}") from None
        except AttributeError:
            if hasattr(module, "flat"):
                raise
            raise TypeError(
                f"{prefix}{name}: expected what the layer built there, got "
                f"{type(module).__name__}. Remedy: DEQFusion(cells=[...]) for a cell of your own"
            ) from None
    return flat


def weights_and_biases(
    module: nn.Module, owner: type[nn.Module], parts: Sequence[tuple[str, type[nn.Module]]]
) -> list[Tensor]:
    """Weight and bias of each part of ``module``, by name and by the class that it was built of.

    Args:
        module: a cell or a combination.
        owner: the class that ``module`` is made of.
        parts: names of submodules and their classes, ``CellLinear`` or ``nn.GroupNorm``.

    Raises:
        TypeError: a part that computes something else than its class does, or recomputes its
            weight when it is called, which it never is.
        ValueError: a GroupNorm with other groups or another eps.
    """
    if not torch.compiler.is_compiling() and type(module) is owner:
        plain = plain_weights_and_biases(module, parts)
        if plain is not None:
            return plain
    if type(module).forward is not owner.forward:
        raise TypeError(
            f"forward: expected that of {owner.__name__}, got one of {type(module).__name__}, "
            "which the layer does not call. Remedy: DEQFusion(cells=[...]) for a cell of your own, "
            "deqfuse.DEQ for other equations"
        )
    flat: list[Tensor] = []
    for name, kind in parts:
        part: Any = getattr(module, name)
        expected = nn.GroupNorm if kind is nn.GroupNorm else nn.Linear
        if getattr(type(part), "forward", None) is not expected.forward or (
            "forward" in vars(part)
        ):
            raise TypeError(
                f"{name}: expected torch.nn.{expected.__name__}, whose weight and bias are all "
                f"there is to it, got {type(part).__module__}.{type(part).__qualname__}. The layer "
                "reads them and calls no part. Remedy: a parametrisation "
                "(torch.nn.utils.parametrize), or an adapter that leaves this layer out"
            )
        if any(_of_opacus(hook) for hook in part._forward_hooks.values()):
            raise TypeError(
                f"{name}: expected no hooks of Opacus, got some: the layer reads its parts and "
                "calls none, so that they never fire and there are no per-sample gradients. "
                "Remedy: torch.func.vmap(torch.func.grad(...)) over the samples"
            )
        # Under dynamic=True a float is a symbol, and comparing one costs a second graph.
        if expected is nn.GroupNorm and (
            part.num_groups != module.num_groups
            or (not torch.compiler.is_compiling() and part.eps != GROUP_NORM_EPS)
        ):
            raise ValueError(
                f"{name}: expected GroupNorm with num_groups={module.num_groups} and "
                f"eps={GROUP_NORM_EPS:g}, got num_groups={part.num_groups}, eps={part.eps:g}"
            )
        flat += [_tensor(part, name, which) for which in ("weight", "bias")]
    return flat


def _of_opacus(hook: Any) -> bool:
    return getattr(hook, "__module__", None) is not None and hook.__module__.startswith("opacus.")


def _tensor(part: Any, name: str, which: str) -> Tensor:
    """A parameter, a parametrised one, or a tensor that somebody put in its place."""
    value = getattr(part, which)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}.{which}: expected a torch.Tensor, got {type(value).__name__}. Remedy: "
            "parts with weight and bias (bias=True, affine=True), not quantised"
        )
    recomputed = part._parameters.get(which) is None and not parametrize.is_parametrized(
        part, which
    )
    if recomputed and part._forward_pre_hooks:
        raise TypeError(
            f"{name}.{which}: expected a parameter or a parametrisation, got a tensor beside a "
            "forward pre-hook, which never runs: the layer calls no part. Remedy: "
            "torch.nn.utils.parametrizations.weight_norm or spectral_norm instead of "
            "torch.nn.utils.weight_norm or spectral_norm; torch.nn.utils.prune.remove"
        )
    return value
