"""``DEQFusion``: the deep-equilibrium multimodal fusion layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqfuse import checks, functional
from deqfuse.backends import BACKENDS, maps
from deqfuse.backends.maps import VARIANTS, CellParams, FuseParams, Variant
from deqfuse.nn.cells import INITS, PurifyCombine, ResidualCell, dropout_mask
from deqfuse.result import BlockInfo, SolveInfo
from deqfuse.solvers.options import Anderson, GradientOption, Implicit, SolverOption
from deqfuse.solvers.rows import Rows


class DEQFusion(nn.Module):
    """Deep-equilibrium multimodal fusion (Ni et al., arXiv 2306.16645).

    Features of N modalities pass N residual cells and a soft-gated purify-then-combine step; the
    output is the joint equilibrium of all N + 1 equations, found per row, differentiated by the implicit
    function theorem. The cells do not depend on each other or on z_f, so they are solved first and the
    fuse equation after them: the same equilibrium as the joint solve of Eq. 17, at less cost.

    Args:
        dim: features d of the fused space.
        num_modalities: N >= 1.
        num_groups: groups of every GroupNorm; divides ``dim``.
        cell: "residual" (Eq. 8), or "identity" (z_i* = x_i, Table 6).
        combine: "purify" (Eqs. 9-12), "sum" (z_f* = sum_i z_i*) or "weighted_sum" (z_f* = x_f and
            nothing else, Tables 6 and 7).
        gate: False leaves the purification out (z'_i = z_i, Table 8); z_f* is then in closed form.
        weight_tied_steps: k steps of all equations from zero with backpropagation through them,
            instead of the equilibrium (Table 7).
        variant: "paper"; "released", the authors' code (skip ``+ z_i`` before the cell's last relu,
            scalar bias on x_f); "released-mmimdb", their MM-IMDB code (also relu after the last norm).
        in_dims: widths of the N inputs; adds one Linear per modality onto ``dim``.
        dropout: probability on W_f's output, in training mode; one draw per solve.
        init: "contractive" (every row converges, see docs/design.md) or "torch".
        injection_norm: normalises each injection x_i over its features (no parameters), which makes
            the layer insensitive to the scale of its inputs.
        solver, adjoint, on_failure, backend: how to solve, how to differentiate, what to do about rows
            that did not converge, and what to run on ("auto" or a name).

    Parameters that an ablation does not use are not created.

    Example:
        >>> fusion = DEQFusion(64, num_modalities=3)
        >>> z = fusion([x1, x2, x3])  # each (..., 64) -> (..., 64)
    """

    def __init__(
        self,
        dim: int,
        num_modalities: int,
        *,
        num_groups: int = 4,
        cell: Literal["residual", "identity"] = "residual",
        combine: Literal["purify", "sum", "weighted_sum"] = "purify",
        gate: bool = True,
        weight_tied_steps: int | None = None,
        variant: Variant = "paper",
        in_dims: Sequence[int] | None = None,
        dropout: float = 0.0,
        init: Literal["contractive", "torch"] = "contractive",
        injection_norm: bool = False,
        solver: SolverOption = Anderson(),  # noqa: B008 - frozen
        adjoint: GradientOption = Implicit(),  # noqa: B008 - frozen
        on_failure: str = "warn",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.positive_int("num_modalities", num_modalities)
        checks.groups(dim, num_groups)
        checks.one_of("cell", cell, ("residual", "identity"))
        checks.one_of("combine", combine, ("purify", "sum", "weighted_sum"))
        checks.one_of("variant", variant, VARIANTS)
        checks.one_of("init", init, INITS)
        checks.one_of("backend", backend, ("auto", *BACKENDS))
        checks.options(solver, adjoint, on_failure)
        if weight_tied_steps is not None:
            checks.positive_int("weight_tied_steps", weight_tied_steps)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
        self.dim, self.num_modalities, self.num_groups = dim, num_modalities, num_groups
        self.variant, self.injection_norm, self.dropout = variant, injection_norm, float(dropout)
        self.weight_tied_steps = weight_tied_steps
        self.solver, self.adjoint = solver, adjoint
        self.on_failure, self.backend = on_failure, backend

        common: dict[str, Any] = {"num_groups": num_groups, "variant": variant, "init": init}
        self.cell = "identity" if combine == "weighted_sum" else cell
        self.projections = _projections(in_dims, dim, num_modalities)
        self.cells = nn.ModuleList(
            ResidualCell(dim, **common) for _ in range(num_modalities if self.cell == "residual" else 0)
        )
        self.combine: PurifyCombine | None = None
        self.combine_kind = combine
        if combine == "purify":
            self.combine = PurifyCombine(dim, num_modalities, gate=gate, **common)
        if combine == "sum":
            self.register_parameter("modality_weights", None)
        else:
            self.modality_weights = nn.Parameter(torch.ones(num_modalities))
        if variant != "paper" and combine != "sum":
            self.injection_bias = nn.Parameter(torch.zeros(()))
        else:
            self.register_parameter("injection_bias", None)

    def forward(
        self,
        features: Sequence[Tensor],  # N tensors (..., d_i)
        *,
        z0: tuple[Tensor, Tensor] | None = None,  # z_f (..., d), z (N, ..., d)
        return_info: bool = False,
        return_cells: bool = False,
    ) -> Any:
        """Fused features.

        Args:
            features: one tensor (..., d_i) per modality, equal leading dimensions, of the dtype and
                device of the parameters. 16-bit storage is computed in float32.
            z0: warm start (fused, cells), e.g. an earlier output; detached.
            return_info: also return a :class:`SolveInfo`, with statistics of shape (...).
            return_cells: also return the modality equilibria (N, ..., d), differentiable.

        Returns:
            z (..., d); with the flags a tuple ``(z, zs)``, ``(z, info)`` or ``(z, zs, info)``.

        Raises:
            ValueError, TypeError: wrong number, shape, dtype or device of tensors.
            BackendUnavailable: ``backend`` was named and cannot take the call.
            ConvergenceError: rows did not converge and ``on_failure="raise"``.
        """
        x, lead = self._injections(features)  # (N, B, d)
        start_fuse, start_cells = self._start(z0, lead)
        if self.weight_tied_steps is not None:
            z, zs, info = self._weight_tied(x)
        else:
            z, zs, info = self._equilibrium(x, start_fuse, start_cells)
        z, zs = z.to(x.dtype), zs.to(x.dtype)
        outputs: list[Any] = [z.reshape(*lead, self.dim)]
        if return_cells:
            if self.combine_kind == "weighted_sum":
                raise ValueError("return_cells: combine='weighted_sum' has no cells to return")
            outputs.append(zs.reshape(self.num_modalities, *lead, self.dim))
        if return_info:
            fuse, cells, backend, blocks = info
            outputs.append(
                SolveInfo(
                    fuse.reshape(*lead), cells.reshape(self.num_modalities, *lead), backend, blocks
                )
            )
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    # ---- the data flow: injections -> cells -> combination ---------------------------------------

    def _injections(self, features: Sequence[Tensor]) -> tuple[Tensor, torch.Size]:
        """Check, project and normalise the inputs: x (N, B, d) and the leading dimensions."""
        if isinstance(features, Tensor) or len(features) != self.num_modalities:
            got = "a single tensor" if isinstance(features, Tensor) else f"{len(features)} tensors"
            raise ValueError(
                f"features: expected a sequence of num_modalities={self.num_modalities} tensors, got {got}"
            )
        like = next(iter(self.parameters()), None)
        widths = [self.dim] * len(features)
        if self.projections is not None:
            widths = [p.in_features for p in self.projections]  # type: ignore[misc]
        for i, (feature, width) in enumerate(zip(features, widths, strict=True)):
            checks.tensor(f"features[{i}]", feature, like=features[0] if like is None else like)
            lead = tuple(features[0].shape[:-1])
            checks.shape(f"features[{i}]", feature, (*lead, width), "(leading dimensions of features[0], width)")
        lead = features[0].shape[:-1]
        if self.projections is not None:
            features = [p(f) for p, f in zip(self.projections, features, strict=True)]
        x = torch.stack([f.reshape(-1, self.dim) for f in features])
        if self.injection_norm:
            x = F.layer_norm(x, (self.dim,))
        return x, lead

    def _start(
        self, z0: tuple[Tensor, Tensor] | None, lead: torch.Size
    ) -> tuple[Tensor | None, Tensor | None]:
        if z0 is None:
            return None, None
        if self.weight_tied_steps is not None:
            raise ValueError("z0: weight_tied_steps starts from zero by definition; got a warm start")
        if not (isinstance(z0, (tuple, list)) and len(z0) == 2):
            raise TypeError(f"z0: expected a pair (fused, cells), got {type(z0).__name__}")
        for name, value, shape in (
            ("z0[0]", z0[0], (*lead, self.dim)),
            ("z0[1]", z0[1], (self.num_modalities, *lead, self.dim)),
        ):
            checks.tensor(name, value)
            checks.shape(name, value, shape, "(..., dim)" if name == "z0[0]" else "(N, ..., dim)")
        return z0[0].reshape(-1, self.dim), z0[1].reshape(self.num_modalities, -1, self.dim)

    def _x_fuse(self, x: Tensor) -> Tensor:
        """The injection of the fuse equation, ``x_f = sum_i w_i x_i (+ bias)``: (N, B, d) -> (B, d)."""
        x_fuse = (self.modality_weights[:, None, None] * x).sum(0)
        return x_fuse if self.injection_bias is None else x_fuse + self.injection_bias

    def _options(self) -> dict[str, Any]:
        return {
            "num_groups": self.num_groups,
            "variant": self.variant,
            "solver": self.solver,
            "adjoint": self.adjoint,
            "on_failure": self.on_failure,
            "backend": self.backend,
        }

    def _equilibrium(
        self, x: Tensor, start_fuse: Tensor | None, start_cells: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        rows = tuple(x.shape[:-1])
        blocks: list[Callable[[], Any]] = []
        if self.cell == "identity":
            zs, cells, backend = x, BlockInfo.exact(x, rows, 0), "reference"
        else:
            flat = [t for cell in self.cells for t in cell.flat()]  # type: ignore[operator]
            zs, cells, backend = functional.solve_cells(x, flat, z0=start_cells, **self._options())
            blocks.append(lambda: (self._cells_map(x, flat), zs.detach()))
        if self.combine_kind == "weighted_sum":
            return self._x_fuse(x), zs, (BlockInfo.exact(x, rows[1:], 0), cells, backend, ())
        if self.combine is None:
            return zs.sum(0), zs, (BlockInfo.exact(x, rows[1:], 0), cells, backend, tuple(blocks))
        x_fuse, mask = self._x_fuse(x), self._mask(x)
        if self.combine.gate is None:
            z = self.combine(zs[0], zs.to(x.dtype), x_fuse, mask)
            return z, zs, (BlockInfo.exact(x, rows[1:], 1), cells, backend, tuple(blocks))
        cell_sum, params = zs.sum(0), self.combine.flat()
        z, fuse, backend = functional.solve_fuse(
            x_fuse,
            cell_sum,
            params,
            num_modalities=self.num_modalities,
            mask=mask,
            z0=start_fuse,
            **self._options(),
        )
        blocks.append(lambda: (self._fuse_map(x_fuse, cell_sum.detach(), params, mask), z.detach()))
        return z, zs, (fuse, cells, backend, tuple(blocks))

    def _weight_tied(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """k steps of every equation from zero; each step's combination sees that step's cells."""
        z, zs = torch.zeros_like(x[0]), torch.zeros_like(x)
        x_fuse = None if self.modality_weights is None else self._x_fuse(x)
        mask = self._mask(x)
        before = z, zs
        for _ in range(self.weight_tied_steps or 0):
            before = z, zs
            zs = x if self.cell == "identity" else torch.stack(
                [cell(zs[i], x[i]) for i, cell in enumerate(self.cells)]
            )
            if self.combine is not None:
                z = self.combine(z, zs, x_fuse, mask)
            else:
                z = zs.sum(0) if x_fuse is None else x_fuse
        with torch.no_grad():
            fuse, cells = (
                _last_step(old, new, self.solver, self.weight_tied_steps or 0)
                for old, new in zip(before, (z, zs), strict=True)
            )
        return z, zs, (fuse, cells, "reference", ())

    def _mask(self, x: Tensor) -> Tensor | None:
        if self.combine is None or not self.training or self.dropout == 0:
            return None
        return dropout_mask(x[0], self.dropout)

    # ---- the maps themselves, for Jacobian measurements -------------------------------------------

    def _cells_map(self, x: Tensor, flat: list[Tensor]) -> Callable[[Tensor], Tensor]:
        params = CellParams.stack(flat)
        return lambda z: maps.residual_cell(z, x.to(z.dtype), params, self.num_groups, self.variant)

    def _fuse_map(
        self, x_fuse: Tensor, cell_sum: Tensor, flat: list[Tensor], mask: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        params, n = FuseParams(*flat), self.num_modalities
        constant = maps.gate_constant(cell_sum, n, params)
        return lambda z: maps.purify_combine(
            z, x_fuse.to(z.dtype), constant, mask, n, params, self.num_groups, self.variant
        )

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_modalities={self.num_modalities}, num_groups={self.num_groups}, "
            f"variant={self.variant!r}, solver={self.solver}, adjoint={self.adjoint}"
        )

    @classmethod
    def from_released_checkpoint(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        variant: Variant = "released",
        **options: Any,
    ) -> DEQFusion:
        """A layer with the weights of one of the authors' state dicts; see ``deqfuse.checkpoints``."""
        from deqfuse.checkpoints import read_released

        sizes, renamed = read_released(state_dict)
        layer = cls(**sizes, variant=variant, **options)
        layer.load_state_dict(renamed)
        return layer


def _projections(
    in_dims: Sequence[int] | None, dim: int, num_modalities: int
) -> nn.ModuleList | None:
    if in_dims is None:
        return None
    if len(in_dims) != num_modalities:
        raise ValueError(
            f"in_dims: expected num_modalities={num_modalities} widths, got {len(in_dims)}"
        )
    for i, width in enumerate(in_dims):
        checks.positive_int(f"in_dims[{i}]", width)
    return nn.ModuleList(nn.Linear(width, dim) for width in in_dims)


def _last_step(old: Tensor, new: Tensor, solver: SolverOption, steps: int) -> BlockInfo:
    """Residual of the last weight-tied step: converged only if it happens to meet the tolerance."""
    rows = Rows(old.flatten(0, -2), solver.tol, max_iter=1)
    rows.observe(old.flatten(0, -2), new.flatten(0, -2), cost=steps)
    found, shape = rows.solution(), new.shape[:-1]
    return BlockInfo(
        found.residual.view(shape), found.nfe.view(shape), found.outcome.view(shape)
    )
