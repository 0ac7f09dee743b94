"""The two building blocks as modules: residual cell, purify-then-combine."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deqfuse import checks, functional
from deqfuse.backends.maps import VARIANTS, VariantName
from deqfuse.nn.parts import CellLinear, weights_and_biases

Init = Literal["contractive", "torch"]
INITS: tuple[Init, ...] = ("contractive", "torch")
_CELL_PARTS = (
    ("linear1", CellLinear),
    ("linear2", CellLinear),
    ("norm1", nn.GroupNorm),
    ("norm2", nn.GroupNorm),
    ("norm3", nn.GroupNorm),
)
_NORM = (("norm", nn.GroupNorm),)
_COMBINE_PARTS = (("gate", CellLinear), ("fuse", CellLinear), *_NORM)


class ResidualCell(nn.Module):
    """Residual cell of one modality, Eq. 8 of arXiv 2306.16645.

    ``z <- GN3(relu(GN2(W2 relu(GN1(W1 z + b1)) + b2 + x)))``. A modality is one kind of input, such
    as images or text; each has a cell of its own.

    Args:
        dim: features d.
        num_groups: groups of the three GroupNorms; divides ``dim``.
        variant: "paper"; "released" and "released-mmimdb" add the skip ``+ z`` before the last
            relu.
        init: "contractive" draws W2 with standard deviation ``0.1 / sqrt(d)``; "torch" leaves
            torch's default, with which many equilibria are reached by no iteration.
        device: of the parameters; torch's default when not given.
        dtype: of the parameters, a floating one; torch's default when not given.

    The Linear and GroupNorm modules hold parameters and are never called: hooks on them do not
    fire, and a part whose ``forward`` is not theirs is refused. Parametrisations work.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size or an option out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_groups: int = 4,
        variant: VariantName = "paper",
        init: Init = "contractive",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(dim, num_groups, variant, init)
        self.num_groups, self.variant = num_groups, variant
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.linear1 = CellLinear(dim, **like)
        self.linear2 = CellLinear(dim, **like)
        self.norm1 = nn.GroupNorm(num_groups, dim, **like)
        self.norm2 = nn.GroupNorm(num_groups, dim, **like)
        self.norm3 = nn.GroupNorm(num_groups, dim, **like)
        if init == "contractive":
            self.linear2.contract(0.1 / math.sqrt(dim))

    def reset_parameters(self) -> None:
        """Draws the parameters anew, as at construction."""
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]

    def flat(self) -> list[Tensor]:
        """The ten parameters in the order of ``CellParams``: (d, d) or (d,) each.

        Raises:
            TypeError: a part computes something of its own, or has no weight or no bias.
            ValueError: a GroupNorm has other groups or another eps.
        """
        return weights_and_biases(self, ResidualCell, _CELL_PARTS)

    def forward(
        self,
        z: Tensor,  # (B, d)
        x: Tensor,  # (B, d)
    ) -> Tensor:  # (B, d)
        """One step of the cell (not its equilibrium).

        Args:
            z: (B, d) state, in the dtype of ``x``.
            x: (B, d) injection.

        Returns:
            (B, d), the next state.

        Raises:
            TypeError: a wrong type or dtype.
            ValueError: a wrong shape or device.
        """
        return functional.residual_cell(
            z, x, self.flat(), num_groups=self.num_groups, variant=self.variant
        )


class PurifyCombine(nn.Module):
    """Soft gate and combination, Eqs. 9-12 of arXiv 2306.16645.

    ``a_i = W_a (z_f + z_i) + b_a``;  ``z_f <- GN(relu(W_f sum_i (a_i * z_f) + b_f + x_f))``. The
    gate a_i weighs each feature; to purify is to multiply the fused state z_f by it.

    Args:
        dim: features d.
        num_modalities: N, how many kinds of input are fused.
        gate: without it ``z_f = GN(relu(W_f sum_i z_i + b_f + x_f))``, in closed form.
        num_groups: groups of the GroupNorm; divides ``dim``.
        variant: "paper" or "released"; "released-mmimdb" has the relu after the GroupNorm.
        init: "contractive" draws W_f with standard deviation ``0.1 / sqrt(d)`` and W_a with
            ``0.25 / (N sqrt(d))``; "torch" leaves torch's default.
        device: of the parameters; torch's default when not given.
        dtype: of the parameters, a floating one; torch's default when not given.

    As in :class:`ResidualCell`, parts are read and not called (``fuse`` is, without a gate).

    Raises:
        TypeError: a size that is no integer, or a flag that is no bool.
        ValueError: a size or an option out of range.
    """

    def __init__(
        self,
        dim: int,
        num_modalities: int,
        *,
        gate: bool = True,
        num_groups: int = 4,
        variant: VariantName = "paper",
        init: Init = "contractive",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(dim, num_groups, variant, init)
        checks.positive_int("num_modalities", num_modalities)
        checks.flag("gate", gate)
        self.num_modalities = num_modalities
        self.num_groups, self.variant = num_groups, variant
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = CellLinear(dim, **like) if gate else None
        self.fuse = CellLinear(dim, **like)
        self.norm = nn.GroupNorm(num_groups, dim, **like)
        if init == "contractive":
            self.fuse.contract(0.1 / math.sqrt(dim))
            if self.gate is not None:
                self.gate.contract(0.25 / (num_modalities * math.sqrt(dim)))

    def reset_parameters(self) -> None:
        """Draws the parameters anew, as at construction."""
        linears = [part for part in (self.gate, self.fuse) if part is not None]
        for part in linears:
            nn.Linear.reset_parameters(part)
        for part in reversed(linears):  # the order of construction: one seed, one layer
            if part.std is not None:
                part.contract(part.std)
        self.norm.reset_parameters()

    def flat(self) -> list[Tensor]:
        """The six parameters in the order of ``FuseParams``, (d, d) or (d,) each; only with a gate.

        Raises:
            TypeError: a part computes something of its own, or has no weight or no bias.
            ValueError: there is no gate, or the GroupNorm has other groups or another eps.
        """
        if self._modules.get("gate") is None:
            raise ValueError("gate: a combination without a gate is not a fixed-point map")
        return weights_and_biases(self, PurifyCombine, _COMBINE_PARTS)

    def forward(
        self,
        z: Tensor,  # (B, d)
        cells: Tensor,  # (N, B, d)
        x_fuse: Tensor,  # (B, d)
        mask: Tensor | None = None,  # (B, d)
    ) -> Tensor:  # (B, d)
        """One step (not the equilibrium). Without a gate the result does not depend on ``z``.

        Args:
            z: (B, d) fused state; dtype and device of ``x_fuse``, as ``cells`` and ``mask``.
            cells: (N, B, d) states of the cells.
            x_fuse: (B, d) injection of the combination.
            mask: (B, d) dropout factors, 0 or 1 / (1 - p), on W_f's output; none when not given.

        Returns:
            (B, d), the next fused state.

        Raises:
            TypeError: a wrong type or dtype.
            ValueError: a wrong shape or device.
        """
        expected = (self.num_modalities, *x_fuse.shape)
        checks.operand("cells", cells, x_fuse, expected, "(N, B, d)")
        if self.gate is None:
            combined = self.fuse(cells.sum(0))
            if mask is not None:
                combined = combined * mask
            weight, bias = weights_and_biases(self, PurifyCombine, _NORM)
            return functional.output_norm(
                combined + x_fuse, weight, bias, self.num_groups, self.variant
            )
        return functional.purify_combine(
            z,
            cells,
            x_fuse,
            self.flat(),
            mask=mask,
            num_groups=self.num_groups,
            variant=self.variant,
        )


def _check(dim: int, num_groups: int, variant: str, init: str) -> None:
    checks.groups(dim, num_groups)
    checks.one_of("variant", variant, VARIANTS)
    checks.one_of("init", init, INITS)


def dropout_mask(like: Tensor, p: float) -> Tensor:
    """Factors 0 or 1 / (1 - p) of the shape of ``like``, one draw for a whole solve."""
    keep = torch.full_like(like, 1.0 - p)
    return torch.bernoulli(keep) / keep
