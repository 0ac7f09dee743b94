"""``DEQFusion``: the deep-equilibrium multimodal fusion layer.

Features enter in ``DEQFusion.forward``, which makes injections of them; ``solving.py`` solves for
their equilibrium. The parameters are read at each call and passed on as plain tensors.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deqfuse import checks, functional, operators
from deqfuse.backends import BACKENDS, BackendName
from deqfuse.backends.maps import VARIANTS, VariantName
from deqfuse.backends.presence import only
from deqfuse.nn import given, inputs, solving
from deqfuse.nn.cells import INITS, Init, PurifyCombine, ResidualCell, dropout_mask
from deqfuse.nn.equations import Equations
from deqfuse.nn.fast import parameter
from deqfuse.nn.parts import flat_parameters
from deqfuse.nn.prepared import PreparedFusion
from deqfuse.reporting import OnFailure
from deqfuse.solvers.anderson import Anderson
from deqfuse.solvers.options import GradientOption, Implicit, SolverOption

_PURIFY_ONLY = "combine: dropout and gate belong to combine='purify'"


class DEQFusion(nn.Module):
    """Deep-equilibrium multimodal fusion (Ni et al., arXiv 2306.16645).

    Features of N modalities (kinds of input, such as images and text) pass N residual cells and a
    soft-gated purify-then-combine step; the output is the joint equilibrium of all N + 1 equations,
    found per row, differentiated by the implicit function theorem. A row is one sample, a problem
    of its own. The cells do not depend on each other or on z_f, so they are solved first and the
    fuse equation after them: the same equilibrium as the joint solve of Eq. 17, at less cost.

    Args:
        dim: features d of the fused space.
        num_modalities: N >= 1.
        num_groups: groups of every GroupNorm; divides ``dim``.
        cell: "residual" (Eq. 8), or "identity" (z_i* = x_i, Table 6); not used by "weighted_sum".
        combine: "purify" (Eqs. 9-12: each modality's gate, a learned weight per feature, multiplies
            the fused state before the N products are added up and combined), "sum"
            (z_f* = sum_i z_i*) or "weighted_sum" (z_f* = x_f and nothing else, Tables 6 and 7).
        cells: a cell of your own for some modalities, one entry each: a module ``(z_i, x_i) ->
            z_i`` that treats rows (R, d) one by one, or None for the layer's own. Solved like
            ``DEQ(f)``, without batch statistics or random draws; shares the layer's dtype.
        injection: a module that makes x_f of the list of the N injections (absent ones are zero),
            in the place of ``sum_i w_i x_i + bias``.
        cell_dims: how many of the last dimensions such modules get as one: 1 for rows (R, d), 2
            for samples (R, T, d) of features (..., T, d). A cell then converges per sample, its T
            rows sharing their statistics; the fuse step stays per row.
        gate: False leaves the purification out (z'_i = z_i, Table 8); z_f* is then in closed form.
        weight_tied_steps: k steps of all equations from zero with backpropagation through them,
            instead of the equilibrium (Table 7); ``solver`` and ``adjoint`` then have no part.
        variant: "paper"; "released", the authors' code (skip ``+ z_i`` before the cell's last relu,
            scalar bias on x_f); "released-mmimdb", their MM-IMDB code (also relu after the last
            norm).
        in_dims: widths of the N inputs; adds one Linear per modality onto ``dim``.
        dropout: probability on W_f's output, in training mode; one draw per solve.
        init: "contractive" (from d = 64 up every row converges before training) or "torch", torch's
            own and the papers' draw.
        injection_norm: divides each injection x_i by its root mean square over the features, which
            makes the layer blind to the scale of its inputs: with the default ``init`` rows
            converge before training at any scale. False leaves x_i as it comes, as the papers'
            equations do; that ``init`` then wants x_i of about unit size.
        solver: how to solve forward: a solver's options, with its tolerance.
        adjoint: how gradients pass through the equilibrium.
        on_failure: "warn", "raise" or "ignore" when rows do not converge, forward or backward.
        backend: what to run on: "auto" (the fastest that accepts the problem), or a name.
        device: of the parameters; torch's default when not given.
        dtype: of the parameters, a floating one; torch's default when not given.

    Parameters that an ablation does not use are not created. The layer reads the parameters of its
    own cells and combination and calls neither, nor their parts: forward hooks on them do not fire
    (on ``projections`` and on the layer they do), and parts that compute something of their own
    (adapters, ``torch.nn.utils.weight_norm``, another eps) are refused. Parametrisations work.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: a size or an option out of range, or options that do not go together.

    Example:
        >>> import torch
        >>> from deqfuse import DEQFusion
        >>> fusion = DEQFusion(64, num_modalities=3)
        >>> x1, x2, x3 = (torch.randn(8, 64) for _ in range(3))
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
        cells: Sequence[nn.Module | Literal["residual"] | None] | None = None,
        injection: nn.Module | None = None,
        cell_dims: int = 1,
        gate: bool = True,
        weight_tied_steps: int | None = None,
        variant: VariantName = "paper",
        in_dims: Sequence[int] | None = None,
        dropout: float = 0.0,
        init: Init = "contractive",
        injection_norm: bool = True,
        solver: SolverOption = Anderson(),  # noqa: B008 - frozen
        adjoint: GradientOption = Implicit(),  # noqa: B008 - frozen
        on_failure: OnFailure = "warn",
        backend: BackendName = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
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
        checks.flag("gate", gate)
        checks.flag("injection_norm", injection_norm)
        if combine != "purify" and not gate:
            raise ValueError(f"{_PURIFY_ONLY}, got combine={combine!r} with gate={gate!r}")
        modules = given.check(cells, injection, cell_dims, num_modalities, cell, combine)
        self._given = tuple(i for i, module in enumerate(modules) if module is not None)
        if num_groups == dim and combine != "weighted_sum":
            warnings.warn(
                f"DEQFusion: num_groups={num_groups} makes groups of one feature, whose GroupNorm "
                "is constant: the layer ignores its input. Remedy: fewer groups",
                stacklevel=2,
            )
        self.dim, self.num_modalities, self.num_groups = dim, num_modalities, num_groups
        self.variant, self.injection_norm = variant, injection_norm
        self.combine_kind, self.dropout = combine, dropout
        self.weight_tied_steps = weight_tied_steps
        self.solver, self.adjoint = solver, adjoint
        self.on_failure, self.backend = on_failure, backend

        like: dict[str, Any] = {"device": device, "dtype": dtype}
        common: dict[str, Any] = {
            "num_groups": num_groups, "variant": variant, "init": init, **like
        }  # fmt: skip
        self.cell = "identity" if combine == "weighted_sum" else cell
        self.projections = _projections(in_dims, dim, num_modalities, like)
        self.cells = nn.ModuleList(
            ResidualCell(dim, **common) if module is None else module
            for module in (modules if self.cell == "residual" else ())
        )
        self.combine: PurifyCombine | None = None
        if combine == "purify":
            self.combine = PurifyCombine(dim, num_modalities, gate=gate, **common)
        self.injection, self.cell_dims = injection, cell_dims
        if combine == "sum" or injection is not None:
            self.register_parameter("modality_weights", None)
        else:
            self.modality_weights = nn.Parameter(torch.ones(num_modalities, **like))
        if VARIANTS[variant].bias and self.modality_weights is not None:
            self.injection_bias = nn.Parameter(torch.zeros(1, **like))  # FSDP2 takes no scalars
        else:
            self.register_parameter("injection_bias", None)

    def reset_parameters(self) -> None:
        """Draws every parameter anew, as at construction; what follows ``to_empty``."""
        for part in (*(self.projections or ()), *self.cells, self.combine, self.injection):
            if part is not None:
                given.reset(part)
        if self.modality_weights is not None:
            nn.init.ones_(self.modality_weights)
        if self.injection_bias is not None:
            nn.init.zeros_(self.injection_bias)

    @property
    def dropout(self) -> float:
        """Probability on W_f's output, in training mode."""
        return self._dropout

    @dropout.setter
    def dropout(self, p: float) -> None:
        if isinstance(p, bool) or not isinstance(p, (int, float)):
            raise TypeError(f"dropout: expected a number, got {p!r}")
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {p!r}")
        if p and self.combine_kind != "purify":
            raise ValueError(
                f"{_PURIFY_ONLY}, got combine={self.combine_kind!r} with dropout={p!r}"
            )
        self._dropout = float(p)
        self._drops = p > 0  # a bool: torch.compile would trace a float attribute as dynamic

    def forward(
        self,
        features: Sequence[Tensor],  # N tensors (..., d_i)
        *,
        present: Tensor | None = None,  # (..., N)
        z0: tuple[Tensor, Tensor] | None = None,  # z_f (..., d), z (N, ..., d)
        return_info: bool = False,
        return_cells: bool = False,
    ) -> Any:
        """Fused features.

        Args:
            features: one tensor (..., d_i) per modality, equal leading dimensions, of the dtype and
                device of the parameters; d_i is ``dim``, or what ``in_dims`` says. 16-bit storage
                is computed in float32.
            present: (..., N) bool, which modalities a row has; all when not given. A row's answer
                and gradients are those of the layer made of its present modalities alone: sums run
                over these, cells of absent ones are not solved (their equilibrium is zero, their
                outcome ``Outcome.ABSENT``). What stands in an absent feature is not read, NaN
                included. :class:`ModalityDropout` and :func:`present_from_nan` make such masks.
            z0: warm start (fused (..., d), cells (N, ..., d)), e.g. an earlier output; detached.
            return_info: also return a :class:`SolveInfo`, with statistics of shape (...).
            return_cells: also return the modality equilibria (N, ..., d), differentiable.

        Returns:
            z (..., d) in the dtype of the features; with the flags a tuple ``(z, zs)``, ``(z,
            info)`` or ``(z, zs, info)``.

        Raises:
            TypeError: an argument of a wrong type or dtype.
            ValueError: a wrong number, shape or device of tensors; on the CPU also a row with
                nothing present, which elsewhere ends as ``Outcome.EMPTY`` with an answer of NaN.
            BackendUnavailable: ``backend`` was named and cannot take the call.
            NotImplementedError: given cells under ``torch.export`` or a ``torch.func`` transform.
            ConvergenceError: rows did not converge and ``on_failure="raise"``.
        """
        lead = inputs.check_features(features, self._widths(), self._like())
        if present is not None:
            present = inputs.check_present(present, (*lead, self.num_modalities), features[0])
        xs = self._injections(features, lead, present)  # N tensors (B, d)
        x, joint = xs[0], given.positions(lead, self.cell_dims)
        functional.require_backend(x, self.num_groups, self.solver, self.adjoint, self.backend)
        if return_cells and self.combine_kind == "weighted_sum":
            raise ValueError("return_cells: combine='weighted_sum' has no cells to return")
        if self.weight_tied_steps is None:
            starts = inputs.check_start(z0, self.num_modalities, lead, self.dim, x)
            rows = solving.Rows(self._mask(x), present, joint)
            found = solving.equilibrium(self._equations(), self._how(), xs, rows, *starts)
        elif z0 is not None:
            raise ValueError(
                "z0: weight_tied_steps starts from zero by definition, got a warm start"
            )
        else:
            rows, steps = solving.Rows(self._mask(x), present, joint), self.weight_tied_steps
            equations = self._equations()
            found = solving.weight_tied(equations, self._how(), torch.stack(xs), rows, steps)
        return found.outputs(lead, x.dtype, return_info, return_cells)

    def prepare(self) -> PreparedFusion:
        """This layer for serving: parameters looked up and checked once, calls without gradients.

        Returns:
            A :class:`deqfuse.nn.PreparedFusion`, called as the layer is, with its answers.

        Raises:
            TypeError: a part of the layer that it could not be called with either.
            ValueError: training mode with dropout; an ablation, a given cell or injection,
                ``weight_tied_steps`` or ``Unrolled()``; parameters without a version counter.
            BackendUnavailable: ``backend`` was named and cannot take these calls.
        """
        return PreparedFusion(
            self._equations(), self._how(), self._like(), self._widths(), self._injections, self
        )

    def _like(self) -> Tensor | None:
        """A parameter, whose dtype and device features must have; any would do."""
        like = parameter(self, "modality_weights")
        return next(iter(self.parameters()), None) if like is None else like

    def _injections(
        self, features: Sequence[Tensor], lead: torch.Size, present: Tensor | None
    ) -> list[Tensor]:
        """Project and normalise the inputs: N tensors (B, d)."""
        xs = list(features) if len(lead) == 1 else [f.reshape(-1, f.shape[-1]) for f in features]
        in_front = self.projections is not None or self.injection_norm
        if present is not None and in_front and torch.is_grad_enabled():
            xs = only(xs, present)  # a NaN would reach the gradients of what stands in front
        if self.projections is not None:
            xs = [p(x) for p, x in zip(self.projections, xs, strict=True)]
        dtypes = {x.dtype for x in xs}
        if len(dtypes) > 1:  # under autocast
            dtype = functools.reduce(torch.promote_types, dtypes)
            xs = [x.to(dtype) for x in xs]
        if self.injection_norm:
            options = self.num_groups, self.solver, self.adjoint, self.backend
            xs = operators.unit_size(xs, functional.choose_backend(xs[0], *options))
        return xs

    def _widths(self) -> list[int]:
        if self.projections is None:
            return [self.dim] * self.num_modalities
        return [p.in_features for p in self.projections]  # type: ignore[misc]

    def _equations(self) -> Equations:
        """What is to be solved, with the parameters of this call: functional_call lends its own."""
        parts: dict[str, Any] = self._modules
        combine = parts.get("combine")  # not there where it is None
        gated = combine is not None and combine._modules.get("gate") is not None
        weights = parameter(self, "modality_weights")
        own, by_user = given.split(parts["cells"]._modules, self._given)
        return Equations(
            cells=flat_parameters(own, "cells."),
            fuse=flat_parameters({"combine": combine}) if gated else [],
            weights=weights,
            bias=parameter(self, "injection_bias"),
            closed_form=None if gated else solving.closed_form(combine, weights),
            num_modalities=self.num_modalities,
            num_groups=self.num_groups,
            variant=self.variant,
            given=by_user,
            injection=parts.get("injection"),
        )

    def _how(self) -> solving.How:
        return solving.How(self.solver, self.adjoint, self.on_failure, self.backend)

    def _mask(self, like: Tensor) -> Tensor | None:
        """One draw of dropout factors (B, d), where they apply."""
        if not self._drops or not self.training or self.combine is None:
            return None
        return dropout_mask(like, self.dropout)

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {
            "dim": self.dim, "num_modalities": self.num_modalities, "num_groups": self.num_groups,
            "cell": self.cell, "combine": self.combine_kind,
        }  # fmt: skip
        if self.combine is not None:
            shown |= {"gate": self.combine.gate is not None, "dropout": self.dropout}
        if self.cell_dims != 1:
            shown["cell_dims"] = self.cell_dims
        shown |= {"variant": self.variant, "injection_norm": self.injection_norm}
        if self.weight_tied_steps is None:
            shown |= {"solver": self.solver, "adjoint": self.adjoint}
        else:
            shown["weight_tied_steps"] = self.weight_tied_steps
        shown |= {"on_failure": self.on_failure, "backend": self.backend}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    @classmethod
    def from_released_checkpoint(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        variant: VariantName = "released",
        **options: Any,
    ) -> DEQFusion:
        """A layer with the weights of an authors' state dict; see ``deqfuse.checkpoints``.

        Args:
            state_dict: the released tensors by name, weights (d, d), (d,) or as 1x1 convolutions;
                any prefix is removed.
            variant: "released" or "released-mmimdb".
            **options: further arguments of :class:`DEQFusion`; sizes come from the state dict, and
                ``injection_norm`` is False when not given, as these weights were trained.

        Returns:
            A layer with these weights, in their dtype.

        Raises:
            ValueError: another variant, or names and shapes that are no released layer's.
        """
        from deqfuse.checkpoints import read_released

        checks.one_of("variant", variant, ("released", "released-mmimdb"))
        sizes, renamed = read_released(state_dict)
        options = {"injection_norm": False, **options}
        layer = cls(**sizes, variant=variant, **options).to(renamed["combine.norm.weight"].dtype)
        layer.load_state_dict(renamed)
        return layer


def _projections(
    in_dims: Sequence[int] | None, dim: int, num_modalities: int, like: dict[str, Any]
) -> nn.ModuleList | None:
    if in_dims is None:
        return None
    checks.sequence("in_dims", in_dims, "widths")
    if len(in_dims) != num_modalities:
        raise ValueError(
            f"in_dims: expected num_modalities={num_modalities} widths, got {len(in_dims)}"
        )
    for i, width in enumerate(in_dims):
        checks.positive_int(f"in_dims[{i}]", width)
    return nn.ModuleList(nn.Linear(width, dim, **like) for width in in_dims)
