"""The Linear and GroupNorm modules inside a cell: how they are drawn, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deqfuse.backends.maps import GROUP_NORM_EPS


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


def parameter(module: nn.Module, name: str) -> Tensor:
    """``module.name`` at a third of the cost; whatever it is where it is not a plain parameter."""
    held = module._parameters
    return held[name] if name in held else getattr(module, name)  # type: ignore[return-value]


def weights_and_biases(
    module: nn.Module, owner: type[nn.Module], linears: Sequence[str], norms: Sequence[str]
) -> list[Tensor]:
    """Weight and bias of each named submodule; ``owner`` is the class that ``module`` is made of.

    Looked up where ``nn.Module`` keeps them: its attribute access takes ten times as long, and a
    layer has dozens of parameters. Parts that are not as constructed are looked at one by one.

    Raises:
        TypeError: a part that computes something else than its class does, or recomputes its
            weight when it is called, which it never is.
    """
    if torch.compiler.is_compiling() or type(module) is not owner:
        return _looked_at(module, owner, linears, norms)
    parts, num_groups = module._modules, module.num_groups
    flat: list[Tensor] = []
    try:
        for name in linears:
            part: Any = parts[name]
            own = part.__dict__
            held = own["_parameters"]
            bias = held["bias"]
            if type(part) is not CellLinear or "forward" in own or bias is None:
                return _looked_at(module, owner, linears, norms)
            flat += held["weight"], bias
        for name in norms:
            part = parts[name]
            own = part.__dict__
            held = own["_parameters"]
            bias = held["bias"]
            if (
                type(part) is not nn.GroupNorm
                or "forward" in own
                or bias is None
                or own["eps"] != GROUP_NORM_EPS
                or own["num_groups"] != num_groups
            ):
                return _looked_at(module, owner, linears, norms)
            flat += held["weight"], bias
    except KeyError:  # parametrised, pruned, replaced
        return _looked_at(module, owner, linears, norms)
    return flat


def _looked_at(
    module: Any, owner: type[nn.Module], linears: Sequence[str], norms: Sequence[str]
) -> list[Tensor]:
    """:func:`weights_and_biases` of parts that may be anything, at a higher cost."""
    if type(module).forward is not owner.forward:
        raise TypeError(
            f"forward: expected that of {owner.__name__}, got one of {type(module).__name__}, "
            "which the layer does not call. Remedy: deqfuse.DEQ for equations of your own"
        )
    flat: list[Tensor] = []
    for name in (*linears, *norms):
        part: Any = getattr(module, name)
        expected = nn.Linear if name in linears else nn.GroupNorm
        if getattr(type(part), "forward", None) is not expected.forward or (
            "forward" in vars(part)
        ):
            raise TypeError(
                f"{name}: expected torch.nn.{expected.__name__}, whose weight and bias are all "
                f"there is to it, got {type(part).__name__}. The layer reads them and calls no "
                "part. Remedy: a parametrisation (torch.nn.utils.parametrize)"
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
        flat += (_tensor(part, name, which) for which in ("weight", "bias"))
    return flat


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
