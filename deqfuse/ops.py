"""Operator schemas and shape rules. torch only; the named backend is loaded when a call runs.

Six operators: the forward solve and the adjoint of each block kind and of the layer. Options travel
as text (``Option.code``), so one schema serves every solver and every backend, and
``torch.compile`` sees constants. The gradient rule is registered in ``autograd.py``, whose eager
path calls the bodies (``run_*``) themselves: two trips through the dispatcher cost more than a
small solve.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from deqfuse import backends
from deqfuse.backends import native
from deqfuse.backends.problem import compute_dtype
from deqfuse.solvers.options import from_code

_COMMON = "int num_groups, str variant, str solver, str adjoint, str backend, str on_failure"

torch.library.define(
    "deqfuse::solve_cells",
    f"(Tensor x, Tensor[] params, Tensor? z0, {_COMMON}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "deqfuse::solve_fuse",
    "(Tensor x_fuse, Tensor cell_sum, Tensor[] params, Tensor? mask, Tensor? z0, "
    f"int num_modalities, {_COMMON}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "deqfuse::solve_layer",
    f"(Tensor[] x, Tensor[] params, Tensor? mask, Tensor? z0_fuse, Tensor? z0_cells, {_COMMON}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "deqfuse::adjoint_cells",
    "(Tensor grad_z, Tensor z, Tensor x, Tensor[] params, int num_groups, str variant, "
    "str adjoint, str backend, bool want_params) -> (Tensor, Tensor[], Tensor, Tensor, Tensor)",
)
torch.library.define(
    "deqfuse::adjoint_fuse",
    "(Tensor grad_z, Tensor z, Tensor x_fuse, Tensor cell_sum, Tensor[] params, Tensor? mask, "
    "int num_modalities, int num_groups, str variant, str adjoint, str backend, bool want_params) "
    "-> (Tensor, Tensor, Tensor[], Tensor, Tensor, Tensor)",
)

torch.library.define(
    "deqfuse::adjoint_layer",
    "(Tensor grad_z, Tensor? grad_cells, Tensor states, Tensor[] x, Tensor[] params, Tensor? mask, "
    "int num_groups, str variant, str adjoint, str backend, bool want_params) "
    "-> (Tensor[], Tensor[], Tensor, Tensor, Tensor)",
)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A converging loop keeps its norms in float32: autocast ends at the operator's door."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()  # entering torch.autocast costs more than it looks
    return torch.autocast(device_type=device.type, enabled=False)


def traced(t: Tensor) -> bool:
    """Whether a call is recorded rather than run: ``t`` has a shape and no values to look at."""
    return torch.compiler.is_compiling() or t.is_meta or isinstance(t, FakeTensor)


def unwrapped(t: Tensor) -> Tensor:
    """``t`` without the wrappers of ``torch.func``, which hide its values."""
    if not torch._C._are_functorch_transforms_active():
        return t
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def run_solve_cells(x, params, z0, num_groups, variant, solver, adjoint, backend, on_failure):  # type: ignore[no-untyped-def]
    with full_precision(x.device):
        return tuple(
            backends.load(backend).solve_cells(
                x, params, z0, num_groups, variant, from_code(solver)
            )
        )


def run_solve_fuse(  # type: ignore[no-untyped-def]
    x_fuse, cell_sum, params, mask, z0, num_modalities,
    num_groups, variant, solver, adjoint, backend, on_failure,
):  # fmt: skip
    with full_precision(x_fuse.device):
        return tuple(
            backends.load(backend).solve_fuse(
                x_fuse, cell_sum, params, mask, z0, num_modalities,
                num_groups, variant, from_code(solver),
            )
        )  # fmt: skip


# The layer's bodies tell their callers in eager mode as well whether all rows are known to have
# converged, which saves these a look at the outcomes: 20 us behind a small solve.
def run_solve_layer(  # type: ignore[no-untyped-def]
    x, params, mask, z0_fuse, z0_cells, num_groups, variant, solver, adjoint, backend, on_failure
):
    with full_precision(x[0].device):
        return tuple(
            backends.load(backend).solve_layer(
                x, params, mask, z0_fuse, z0_cells, num_groups, variant, from_code(solver)
            )
        )


def run_adjoint_cells(grad_z, z, x, params, num_groups, variant, adjoint, backend, want_params):  # type: ignore[no-untyped-def]
    with full_precision(z.device):
        dx, dparams, statistics = backends.load(backend).adjoint_cells(
            grad_z, z.contiguous(), x, params, num_groups, variant, from_code(adjoint), want_params
        )
    return dx, dparams, *statistics


def run_adjoint_fuse(  # type: ignore[no-untyped-def]
    grad_z, z, x_fuse, cell_sum, params, mask, num_modalities,
    num_groups, variant, adjoint, backend, want_params,
):  # fmt: skip
    with full_precision(z.device):
        dx, dcell_sum, dparams, statistics = backends.load(backend).adjoint_fuse(
            grad_z, z.contiguous(), x_fuse, cell_sum, params, mask, num_modalities,
            num_groups, variant, from_code(adjoint), want_params,
        )  # fmt: skip
    return dx, dcell_sum, dparams, *statistics


def run_adjoint_layer(  # type: ignore[no-untyped-def]
    grad_z, grad_cells, states, x, params, mask, num_groups, variant, adjoint, backend, want_params
):
    with full_precision(states.device):
        dx, dparams, statistics = backends.load(backend).adjoint_layer(
            grad_z, grad_cells, states.contiguous(), x, params, mask,
            num_groups, variant, from_code(adjoint), want_params,
        )  # fmt: skip
    return dx, dparams, *statistics


for _body, _results in (
    (run_solve_cells, 5), (run_solve_fuse, 5), (run_solve_layer, 6),
    (run_adjoint_cells, 5), (run_adjoint_fuse, 6), (run_adjoint_layer, 5),
):  # fmt: skip
    _name = _body.__name__.removeprefix("run_")
    torch.library.impl(f"deqfuse::{_name}", "CompositeExplicitAutograd")(
        lambda *inputs, _body=_body, _results=_results: _body(*inputs)[:_results]
    )


def _fake_solved(x: Tensor, solver: str) -> tuple[Tensor, ...]:
    option = from_code(solver)
    steps = option.trace_length if option.trace else 0
    return native.empty_solved(x, steps, compute_dtype(x.dtype))


@torch.library.register_fake("deqfuse::solve_cells")
def _fake_solve_cells(x, params, z0, num_groups, variant, solver, *rest):  # type: ignore[no-untyped-def]
    return _fake_solved(x, solver)


@torch.library.register_fake("deqfuse::solve_fuse")
def _fake_solve_fuse(x_fuse, cell_sum, params, mask, z0, n, num_groups, variant, solver, *rest):  # type: ignore[no-untyped-def]
    return _fake_solved(x_fuse, solver)


@torch.library.register_fake("deqfuse::solve_layer")
def _fake_solve_layer(x, params, mask, z0_fuse, z0_cells, num_groups, variant, solver, *rest):  # type: ignore[no-untyped-def]
    states, *statistics = _fake_solved(native.empty_states(x), solver)
    return states.new_empty(x[0].shape), states, *statistics


@torch.library.register_fake("deqfuse::adjoint_cells")
def _fake_adjoint_cells(grad_z, z, x, params, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), native.empty_grads(params, rest[-1]), *native.empty_statistics(z)


@torch.library.register_fake("deqfuse::adjoint_fuse")
def _fake_adjoint_fuse(grad_z, z, x_fuse, cell_sum, params, mask, *rest):  # type: ignore[no-untyped-def]
    return (
        x_fuse.new_empty(x_fuse.shape),
        cell_sum.new_empty(cell_sum.shape),
        native.empty_grads(params, rest[-1]),
        *native.empty_statistics(z),
    )


@torch.library.register_fake("deqfuse::adjoint_layer")
def _fake_adjoint_layer(grad_z, grad_cells, states, x, params, mask, *rest):  # type: ignore[no-untyped-def]
    dx = [t.new_empty(t.shape) for t in x]
    return dx, native.empty_grads(params, rest[-1]), *native.empty_statistics(states)


solve_cells = torch.ops.deqfuse.solve_cells.default
solve_fuse = torch.ops.deqfuse.solve_fuse.default
solve_layer = torch.ops.deqfuse.solve_layer.default
adjoint_cells = torch.ops.deqfuse.adjoint_cells.default
adjoint_fuse = torch.ops.deqfuse.adjoint_fuse.default
adjoint_layer = torch.ops.deqfuse.adjoint_layer.default
