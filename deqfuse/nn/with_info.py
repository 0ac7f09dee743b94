"""``WithInfo``: for training loops that call a fusion module with its features only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deqfuse.result import SolveInfo


class WithInfo(nn.Module):
    """Calls a fusion module with ``return_info=True``: ``module(xs) -> (fused, info)``.

    A loop that takes the first entry of a tuple as the fused tensor, and gives the tuple to the
    objective, gives the objective ``info.jacobian_penalty()`` in this way. MultiBench does: its
    ``objective_args_dict["fused"]`` is then ``(fused, info)``; see ``examples/multibench.py``.

    Args:
        fusion: a ``DEQFusion``, or a ``ProFusion``.

    Raises:
        TypeError: ``fusion`` is no module.
    """

    def __init__(self, fusion: nn.Module) -> None:
        super().__init__()
        if not isinstance(fusion, nn.Module):
            raise TypeError(f"fusion: expected a torch.nn.Module, got {type(fusion).__name__}")
        self.fusion = fusion

    def forward(self, features: Sequence[Any], **options: Any) -> tuple[Tensor, SolveInfo]:
        """What the module returns, with its :class:`SolveInfo`.

        Args:
            features: what the module takes, N tensors (..., d_i) for a ``DEQFusion``.
            **options: handed on, such as ``present`` for a ``DEQFusion``.

        Returns:
            The fused tensor (..., d) and the record of its solve.
        """
        fused, info = self.fusion(features, return_info=True, **options)
        return fused, info
