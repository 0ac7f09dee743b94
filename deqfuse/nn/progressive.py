"""``ProFusion``: progressive fusion of any late-fusion model, unrolled or at its equilibrium."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from deqfuse import checks, functional
from deqfuse.nn.inspection import (
    check_modules,
    per_encoder,
    uses_batch_statistics,
)
from deqfuse.nn.sites import EncoderRun, RandomState, Site, find_site, tensors, version
from deqfuse.nn.statistics import last_step
from deqfuse.reporting import OnFailure
from deqfuse.result import SolvedMap, SolveInfo
from deqfuse.solvers.anderson import Anderson
from deqfuse.solvers.options import GradientOption, Implicit, SolverOption, Unrolled
from deqfuse.torch_private import in_transform, traced


class ProFusion(nn.Module):
    """Progressive fusion (Shankar et al., arXiv 2209.00302) around a given late-fusion model.

    The fused vector is projected back to the unimodal encoders and the model is applied again,
    with the same weights::

        c_0 = 0,    c_t = fusion([encoder_i(x_i + V_i c_{t-1}) for i]),    output = head(c_R)

    with ``steps=R`` by backpropagation through the steps, with ``solver=`` at the equilibrium
    ``c = fusion(...c...)`` by the implicit gradient. ``steps=1`` is the given model, bit for bit.

    All applications of one forward share their random draws (dropout): they are applications of
    one map, and the generators move on as in one call of the given model.

    A missing modality is the given model's own business: ``present=`` is refused, since what stands
    for an absent input depends on the encoders (no input has a value that means "absent" to all of
    them), and the fusion may or may not know a mask. Two ways: an encoder that answers an absent
    input, marked by NaN for instance, with a constant or learned vector (the context is added to
    the mark, too, and leaves NaN as it is), and replaces the mark before its first weights, whose
    gradients would be NaN otherwise; or a fusion module that is given the mask beforehand and
    passes it on, as ``DEQFusion`` takes it, with zeros for absent inputs.

    Args:
        encoders: N modules, each with one positional argument.
        fusion: module that maps the list of N unimodal representations to the context
            (B, context_dim), or to a tuple whose first entry it is.
        context_dim: width of the context.
        steps: R >= 1 applications of the model; 2 when neither ``steps`` nor ``solver`` is given.
        solver: forward solver of the equilibrium, instead of ``steps``. An equilibrium needs rows
            (samples) that do not depend on each other: batch norm behind a site must be in eval
            mode.
        adjoint: how gradients pass through the equilibrium.
        inject: "add" (x_i + V_i c), or "concat": V_i c as extra input columns, zero at first. They
            are added to the site's first Linear, as parameters of this module; an encoder whose
            first Linear takes more columns than ``in_dims[i]`` says has them already.
        in_dims: widths of the injection sites, read off the first Linear (convolution, recurrent
            layer) of each site when not given.
        batch_dims: per encoder the dimension of the rows at its site: 1 for (T, B, d), else 0. When
            not given: 1 for a site that is itself a recurrent, attention or transformer layer
            without ``batch_first``. Where the time is as long as the batch, the first call with
            such shapes checks that a row's context reaches that row only.
        sites: per encoder the name of a submodule whose input is the injection site; "" (or None)
            is the encoder's own input. What an encoder computes before its site is computed once.
        head: module applied to the last context.
        on_failure: "warn", "raise" or "ignore" when rows do not converge.

    Attributes:
        back_projections: V_i, bias-free Linear layers with weights (d_i, context_dim).

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: a wrong number or size, an unknown site, or options that do not go together.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from deqfuse import DEQFusion, ProFusion
        >>> encoders = [nn.Linear(20, 64), nn.Linear(12, 64)]
        >>> model = ProFusion(encoders, DEQFusion(64, 2), 64, steps=3, head=nn.Linear(64, 10))
        >>> x1, x2 = torch.randn(8, 20), torch.randn(8, 12)
        >>> logits = model([x1, x2])  # (8, 10)
        >>> logits, contexts = model([x1, x2], return_contexts=True)  # contexts (3, 8, 64)
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        fusion: nn.Module,
        context_dim: int,
        *,
        steps: int | None = None,
        solver: SolverOption | None = None,
        adjoint: GradientOption = Implicit(),  # noqa: B008 - frozen
        inject: Literal["add", "concat"] = "add",
        in_dims: Sequence[int] | None = None,
        batch_dims: Sequence[int | None] | None = None,
        sites: Sequence[str | None] | None = None,
        head: nn.Module | None = None,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__()
        check_modules(encoders, fusion, head)
        checks.positive_int("context_dim", context_dim)
        if steps is not None and solver is not None:
            raise ValueError(
                f"steps, solver: expected one of them, got steps={steps!r} and solver={solver!r}"
            )
        if solver is None:
            steps = 2 if steps is None else steps
            checks.positive_int("steps", steps)
        checks.options(Anderson() if solver is None else solver, adjoint, on_failure)
        checks.one_of("inject", inject, ("add", "concat"))
        names = per_encoder("sites", sites, len(encoders), "names of submodules")
        widths = per_encoder("in_dims", in_dims, len(encoders), "widths")
        batches = per_encoder("batch_dims", batch_dims, len(encoders), "dimensions")

        self.encoders = nn.ModuleList(encoders)
        self.fusion, self.head, self.context_dim = fusion, head, context_dim
        self.steps, self.solver, self.adjoint = steps, solver, adjoint
        self.inject, self.on_failure = inject, on_failure
        self.back_projections = nn.ModuleList()
        self.extra_columns = nn.ModuleDict()  # by number of the encoder, with inject="concat"
        self._sites: list[Site] = []
        self._seen: set[tuple[torch.Size | None, ...]] = set()  # shapes at the sites: checked
        given = zip(encoders, names, widths, batches, strict=True)
        for i, (encoder, name, width, batch) in enumerate(given):
            site, linear = find_site(f"[{i}]", encoder, name or "", width, batch, inject)
            like = _like_parameters(encoder)
            self._sites.append(site)
            self.back_projections.append(nn.Linear(context_dim, site.width, bias=False, **like))
            if linear is not None:
                columns = nn.Linear(site.width, linear.out_features, bias=False, **like)
                bound = 1 / math.sqrt(linear.in_features + site.width)  # as of one wider Linear
                nn.init.uniform_(columns.weight, -bound, bound)
                self.extra_columns[str(i)] = columns

    def forward(
        self,
        inputs: Sequence[Any],  # N inputs, each (B, ...) or a sequence that starts with such
        *,
        present: None = None,
        return_contexts: bool = False,
        return_info: bool = False,
    ) -> Any:
        """The model's output after the last application.

        Args:
            inputs: what each encoder takes, each (B, ...) or a sequence that starts with such.
            present: refused unless None: see the class for missing modalities.
            return_contexts: also return c_1 .. c_R as one tensor (R, B, context_dim); for an
                equilibrium R = 1. With ``encode`` this gives the unimodal representations of every
                step.
            return_info: also return a :class:`SolveInfo` whose ``fuse`` block has shape (B,). With
                ``steps`` its residual is the last step's change, and "converged" says whether that
                happens to be below Anderson's default tolerance.

        Returns:
            ``head(c_R)``, or c_R (B, context_dim) without a head; with the flags a tuple
            ``(output, contexts)``, ``(output, info)`` or ``(output, contexts, info)``.

        Raises:
            TypeError: inputs, or the fused tensor, of a wrong type or dtype.
            ValueError: ``present`` is given; inputs, or the fused tensor, of a wrong number or
                shape.
            ConvergenceError: rows did not converge and ``on_failure="raise"``.
        """
        if present is not None:
            raise ValueError(
                f"present: expected None, got {type(present).__name__}: what an absent modality "
                "means is up to the given encoders and fusion, which ProFusion only calls. Remedy: "
                "encoders that answer an absent input (marked by NaN, say) with a constant, a "
                "fusion module that holds the mask, or DEQFusion, which takes present="
            )
        model = _Model(self, inputs, again=self.steps != 1)
        contexts, info = self._unrolled(model) if self.solver is None else self._equilibrium(model)
        output = contexts[-1] if self.head is None else self.head(contexts[-1])
        outputs = [output]
        if return_contexts:
            outputs.append(torch.stack(contexts))
        if return_info:
            outputs.append(info())
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def encode(
        self,
        inputs: Sequence[Any],
        context: Tensor | None = None,  # (B, context_dim)
    ) -> list[Any]:
        """Unimodal representations given a context; without one, those of the given model.

        ``encode(xs)`` are the representations of step 1, ``encode(xs, contexts[t - 1])`` those of
        step t + 1 (Appendix G probes them).

        Args:
            inputs: what each encoder takes, each (B, ...) or a sequence that starts with such.
            context: (B, context_dim); the given model's own representations when not given.

        Returns:
            What each of the N encoders returned.
        """
        model = _Model(self, inputs, again=context is not None)
        if context is None:
            return model.encoded
        with RandomState.kept(model.device):
            return model.encode(context)

    @property
    def parameter_overhead(self) -> float:
        """Parameters that progressive fusion adds, as a share of those of the given model.

        Table 10 of the paper reports 1.8% to 4.3%. NaN for a model without parameters.
        """
        given = [self.encoders, self.fusion, *([] if self.head is None else [self.head])]
        known = {p for module in given for p in module.parameters()}
        base = sum(p.numel() for p in known)
        added = sum(p.numel() for p in self.parameters() if p not in known)
        return added / base if base else math.nan

    def _unrolled(self, model: _Model) -> tuple[list[Tensor], Callable[[], SolveInfo]]:
        contexts = [model.fuse(model.encoded)]
        if (self.steps or 1) > 1:
            model.check_alignment(contexts[0])
        while len(contexts) < (self.steps or 1):
            contexts.append(model.apply(contexts[-1]))

        def info() -> SolveInfo:
            new = contexts[-1].detach().flatten(1)
            old = contexts[-2].detach().flatten(1) if len(contexts) > 1 else torch.zeros_like(new)
            block = last_step(old, new, Anderson(), len(contexts))
            return SolveInfo(block, None, "reference")  # no equilibrium: no block has a Jacobian

        return contexts, info

    def _equilibrium(self, model: _Model) -> tuple[list[Tensor], Callable[[], SolveInfo]]:
        model.check_rows()
        first = model.fuse(model.encoded)
        model.check_alignment(first)
        # Solvers begin with f(0), which is the given model's answer: it is there already.
        known = [
            first.flatten(1) if isinstance(self.adjoint, Unrolled) else first.detach().flatten(1)
        ]

        def rows(z: Tensor) -> Tensor:
            return known.pop() if known else model.apply(z.view_as(first)).flatten(1)

        z, block, backend = functional.fixed_point(
            rows,
            torch.zeros_like(first.detach()).flatten(1),
            solver=self.solver or Anderson(),
            adjoint=self.adjoint,
            on_failure=self.on_failure,
        )
        star = z.detach()
        info = SolveInfo(block, None, backend, (lambda: SolvedMap(rows, star),))
        return [z.view_as(first)], lambda: info

    def extra_repr(self) -> str:
        how = f"steps={self.steps}" if self.solver is None else f"solver={self.solver}"
        sites = [site.name for site in self._sites]
        return f"context_dim={self.context_dim}, {how}, inject={self.inject!r}, sites={sites}"


class _Model:
    """The given model on one batch: its own answer, then further applications of the same map."""

    def __init__(self, owner: ProFusion, inputs: Sequence[Any], *, again: bool) -> None:
        checks.sequence("inputs", inputs, "inputs, one per encoder")
        checks.not_symbolic("inputs", *inputs)
        if len(inputs) != len(owner.encoders):
            raise ValueError(
                f"inputs: expected one for each of {len(owner.encoders)} encoders, got "
                f"{len(inputs)}"
            )
        self.owner = owner
        self.device = next((x.device for x in tensors(inputs)), torch.device("cpu"))
        # The solver may evaluate the map any number of times; each starts from these.
        self.buffers = list(_buffers(owner)) if again and owner.solver is not None else []
        self.runs = [
            EncoderRun(encoder, f"encoders[{i}]", site, value, self.device)
            for i, (encoder, site, value) in enumerate(
                zip(owner.encoders, owner._sites, inputs, strict=True)
            )
        ]
        self.encoded = [run.first(again) for run in self.runs]

    def fuse(self, encoded: list[Any]) -> Tensor:
        """Unimodal representations -> context (B, context_dim)."""
        out = self.owner.fusion(encoded)
        fused = out[0] if isinstance(out, tuple) else out
        checks.tensor("fusion's output", fused)
        width = self.owner.context_dim
        if fused.dim() < 2 or fused.shape[-1] != width:
            raise ValueError(
                f"fusion's output: expected shape (B, {width}) = (B, context_dim), got "
                f"{tuple(fused.shape)}. Remedy: context_dim = the fusion's width"
            )
        return fused

    def encode(self, context: Tensor) -> list[Any]:
        """Unimodal representations given a context."""
        owner = self.owner
        encoded = []
        for i, run in enumerate(self.runs):
            back = cast(nn.Linear, owner.back_projections[i])
            injected = back(context.to(back.weight.dtype))  # encoders may be of another dtype
            if run.site.how == "extend":
                injected = owner.extra_columns[str(i)](injected)
            encoded.append(run.again(injected))
            if (
                torch.is_grad_enabled()
                and injected.requires_grad
                and not any(t.requires_grad for t in tensors(encoded[-1]))
            ):
                raise ValueError(
                    f"{run.name}: expected an output that back_projections[{i}] can be trained by, "
                    "got one that no gradient passes (a forward under torch.no_grad, or detach()). "
                    "Remedy: requires_grad_(False) on a frozen encoder, instead of no_grad"
                )
        return encoded

    def apply(self, context: Tensor) -> Tensor:
        """One application of the map; random draws are those of the first."""
        for buffer, before, saved in self.buffers:
            if version(buffer) != before:
                buffer.copy_(saved)
        with RandomState.kept(self.device):
            return self.fuse(self.encode(context))  # encode ends where the first one ended

    def check_alignment(self, context: Tensor) -> None:
        """Once for given shapes: whether a row's context reaches that row and no other.

        Only asked where the shapes at a site leave it open. In eval mode, so that nothing is
        counted or drawn; rows of the batch statistics in training mode are the model's own affair.
        """
        shapes = tuple(run.shape for run in self.runs)
        mistakable = [run.name for run in self.runs if run.may_be_mistaken(len(context))]
        if not mistakable or shapes in self.owner._seen or in_transform() or traced(context):
            return
        one = torch.zeros_like(context)
        one[0] = 1.0
        modes = [(module, module.training) for module in self.owner.modules()]
        try:
            for module, _ in modes:
                module.training = False
            with torch.no_grad():
                change = (self.apply(one) - self.apply(torch.zeros_like(one))).flatten(1).abs()
        finally:
            for module, mode in modes:
                module.training = mode
        reached = change.amax(1)
        if reached[1:].amax() > 1e-3 * reached[0]:  # rounding is far below, a mistake far above
            raise ValueError(
                f"batch_dims: expected a row's context to reach that row only, got an influence on "
                f"others, through {' or '.join(mistakable)}, whose site has two dimensions of "
                f"{len(context)}. Remedy: batch_dims, 1 for (T, B, d); batch_first=True in layers "
                "that take (B, T, d)"
            )
        self.owner._seen.add(shapes)

    def check_rows(self) -> None:
        """An equilibrium is solved row by row: refuse statistics over the batch behind the sites.

        And keep buffers that only the part before a site writes out of ``apply``'s reach.
        """
        before = {module for run in self.runs for module in run.skipped()}
        own = {id(buffer) for module in before for buffer in module.buffers(recurse=False)}
        self.buffers = [entry for entry in self.buffers if id(entry[0]) not in own]
        behind = set() if self.owner.head is None else set(self.owner.head.modules())
        for name, module in self.owner.named_modules():
            if uses_batch_statistics(module) and module not in behind and module not in before:
                raise ValueError(
                    f"{name}: expected rows that do not depend on each other, got "
                    f"{type(module).__name__} with statistics over the batch, behind the injection "
                    "site of an equilibrium. Remedy: eval() for this module, a site behind it, "
                    "LayerNorm or GroupNorm instead, or steps= instead of solver="
                )


def _buffers(owner: nn.Module) -> Iterator[tuple[Tensor, int | None, Tensor]]:
    """Buffers that a forward may write to (batch norm, spectral norm), version and content."""
    for module in owner.modules():
        if module.training:
            for buffer in module.buffers(recurse=False):
                yield buffer, version(buffer), buffer.detach().clone()


def _like_parameters(encoder: nn.Module) -> dict[str, Any]:
    """dtype and device of an encoder's first floating-point parameter."""
    for parameter in encoder.parameters():
        if parameter.is_floating_point():
            return {"dtype": parameter.dtype, "device": parameter.device}
    return {}
