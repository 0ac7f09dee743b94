"""The layer as functions of tensors: validate, resolve options, call the operator.

Parameters are passed explicitly, so these also serve hand-made modules. The modules in
``deqfuse.nn`` are thin owners of parameters around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from deqfuse import backends, checks, operators, reporting
from deqfuse.backends import BackendName, maps, presence, reference
from deqfuse.backends.backend import Backend, Launchers
from deqfuse.backends.maps import VARIANTS, CellParams, FuseParams, VariantName
from deqfuse.backends.problem import Solved
from deqfuse.equilibrium import ITERATES, block_info, fixed_point, uncompiled
from deqfuse.operators.bodies import full_precision
from deqfuse.reporting import OnFailure
from deqfuse.result import BlockInfo
from deqfuse.solvers.anderson import Anderson
from deqfuse.solvers.options import GradientOption, Implicit, SolverOption, Unrolled
from deqfuse.torch_private import can_look

__all__ = [
    "fixed_point",
    "output_norm",
    "purify_combine",
    "residual_cell",
    "solve_cells",
    "solve_fuse",
]

# What torch.compile(fullgraph=True) says about the steps of a solver.
_UNROLLED = f"Unrolled() {ITERATES}Implicit(), or leave fullgraph out"


def residual_cell(
    z: Tensor,  # (B, d)
    x: Tensor,  # (B, d)
    params: Sequence[Tensor],  # ten, as CellParams
    *,
    num_groups: int = 4,
    variant: VariantName = "paper",
) -> Tensor:  # (B, d)
    """One step of one residual cell, Eq. 8 of arXiv 2306.16645; differentiable.

    A cell belongs to one modality, a kind of input such as images or text. It is computed in the
    dtype of ``x``, 16-bit dtypes included.

    Args:
        z: (B, d) state of the cell, one row per sample; dtype and device of ``x``.
        x: (B, d) injection, the features that enter at every step; any floating dtype.
        params: ten tensors of any floating dtype, in the order of ``CellParams`` without its
            modality dimension: weight (d, d) and bias (d,) of two linear maps, then weight (d,) and
            bias (d,) of three GroupNorms.
        num_groups: groups of each GroupNorm; divides d.
        variant: "paper"; "released" and "released-mmimdb" add ``z`` before the last relu.

    Returns:
        (B, d), the next state, in the dtype of ``x``.

    Raises:
        TypeError: an argument that is no tensor, or of a wrong dtype.
        ValueError: a wrong shape, device, number of parameters, or option.
    """
    checks.tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected (B, d), got shape {tuple(x.shape)}")
    checks.tensor("z", z, like=x)
    checks.shape("z", z, tuple(x.shape), "(B, d), the shape of x")
    checks.groups(x.shape[-1], num_groups)
    checks.one_of("variant", variant, VARIANTS)
    _check_count(params, CellParams)
    checks.parameters(params, x, 2, 6)
    stacked = CellParams(*(p[None].to(x.dtype) for p in params))
    return maps.residual_cell(z[None], x[None], stacked, num_groups, VARIANTS[variant])[0]


def purify_combine(
    z: Tensor,  # (B, d)
    cells: Tensor,  # (N, B, d)
    x_fuse: Tensor,  # (B, d)
    params: Sequence[Tensor],  # six, as FuseParams
    *,
    mask: Tensor | None = None,  # (B, d)
    num_groups: int = 4,
    variant: VariantName = "paper",
) -> Tensor:  # (B, d)
    """One step of the soft gate and the combination, Eqs. 9-12 of arXiv 2306.16645; differentiable.

    The gate is a learned linear map that weighs each feature: ``a_i = W_a (z_f + z_i) + b_a``. To
    purify is to multiply the fused state by it: ``a_i * z_f`` is what modality i keeps of ``z_f``.

    Args:
        z: (B, d) fused state z_f; dtype and device of ``x_fuse``, as ``cells`` and ``mask``.
        cells: (N, B, d) states z_i of the N cells.
        x_fuse: (B, d) injection of the combination, ``sum_i w_i x_i`` in the layer.
        params: six tensors of any floating dtype, in the order of ``FuseParams``: weight (d, d) and
            bias (d,) of the gate, of W_f, and weight (d,) and bias (d,) of a GroupNorm.
        mask: (B, d) dropout factors, 0 or 1 / (1 - p), on W_f's output; none when not given.
        num_groups: groups of the GroupNorm; divides d.
        variant: "paper" or "released"; "released-mmimdb" has the relu after the GroupNorm.

    Returns:
        (B, d), the next fused state, in the dtype of ``x_fuse``.

    Raises:
        TypeError: an argument that is no tensor, or no floating one.
        ValueError: a wrong shape, device, number of parameters, or option.
    """
    checks.tensor("x_fuse", x_fuse)
    if x_fuse.dim() != 2:
        raise ValueError(f"x_fuse: expected (B, d), got shape {tuple(x_fuse.shape)}")
    checks.operand("z", z, x_fuse, tuple(x_fuse.shape), "(B, d)")
    checks.tensor("cells", cells)
    checks.shape("cells", cells, (*cells.shape[:1], *x_fuse.shape), "(N, B, d)")
    if mask is not None:
        checks.operand("mask", mask, x_fuse, tuple(x_fuse.shape), "(B, d)")
    checks.groups(x_fuse.shape[-1], num_groups)
    checks.one_of("variant", variant, VARIANTS)
    _check_count(params, FuseParams)
    checks.parameters(params, x_fuse, 2, 2)
    fuse = FuseParams(*(p.to(x_fuse.dtype) for p in params))
    constant = maps.gate_constant(cells.sum(0), cells.shape[0], fuse)
    rest = (cells.shape[0], fuse, num_groups, VARIANTS[variant])
    return maps.purify_combine(z, x_fuse, constant, mask, *rest)


def output_norm(
    e: Tensor,  # (B, d)
    weight: Tensor,  # (d,)
    bias: Tensor,  # (d,)
    num_groups: int,
    variant: VariantName = "paper",
) -> Tensor:  # (B, d)
    """The combination's last step, ``GN(relu(e))``; ``relu(GN(e))`` in "released-mmimdb".

    Eq. 12 of arXiv 2306.16645; differentiable.

    Args:
        e: (B, d), any floating dtype.
        weight: (d,) of the GroupNorm.
        bias: (d,) of the GroupNorm.
        num_groups: groups of the GroupNorm; divides d.
        variant: "paper", "released" or "released-mmimdb".

    Returns:
        (B, d).

    Raises:
        TypeError: an argument that is no tensor, or no floating one.
        ValueError: a wrong shape, device or option.
    """
    checks.tensor("e", e)
    if e.dim() != 2:
        raise ValueError(f"e: expected (B, d), got shape {tuple(e.shape)}")
    checks.groups(e.shape[-1], num_groups)
    checks.one_of("variant", variant, VARIANTS)
    checks.operand("weight", weight, e, (e.shape[-1],), "(d,)")
    checks.operand("bias", bias, e, (e.shape[-1],), "(d,)")
    return maps.output_norm(e, weight, bias, num_groups, VARIANTS[variant])


def solve_cells(
    x: Tensor,  # (N, B, d)
    params: Sequence[Tensor],  # N * 10, cell after cell
    *,
    num_groups: int = 4,
    variant: VariantName = "paper",
    solver: SolverOption = Anderson(),  # noqa: B008 - frozen
    adjoint: GradientOption = Implicit(),  # noqa: B008 - frozen
    z0: Tensor | None = None,  # (N, B, d)
    present: Tensor | None = None,  # (N, B, 1)
    on_failure: OnFailure = "warn",
    backend: BackendName = "auto",
) -> tuple[Tensor, BlockInfo, str]:
    """Equilibria of N residual cells, each row of each modality to its own tolerance.

    ``z_i = cell_i(z_i, x_i)``, Eq. 8 of arXiv 2306.16645. A row is one sample: a problem of its
    own, which stops when it has converged.

    Args:
        x: (N, B, d) injections, any floating dtype; 16-bit storage is computed in float32.
        params: N * 10 floating tensors of one dtype: those of :func:`residual_cell`, each (d, d) or
            (d,), for cell 0, then for cell 1, and so on.
        num_groups: groups of each GroupNorm; divides d.
        variant: "paper", "released" or "released-mmimdb", as in :func:`residual_cell`.
        solver: forward solver with its tolerance and budget.
        adjoint: how gradients pass through the equilibria.
        z0: (N, B, d) start, zero when not given; no gradient flows to it.
        present: (N, B, 1) bool, which modalities a row has; all when not given. Cells of absent
            ones are not solved: they are zero, ``x`` there is not read.
        on_failure: "warn", "raise" or "ignore" when rows do not converge, forward or backward.
        backend: "auto" (the fastest that accepts the problem), or a name.

    Returns:
        The equilibria (N, B, d) in the compute dtype (that of ``x``, at least float32),
        differentiable in ``x`` and ``params``; their statistics, of shape (N, B); the name of the
        backend that ran.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device, number of parameters, or option.
        BackendUnavailable: ``backend`` was named and cannot take the call.
        ConvergenceError: rows failed and ``on_failure="raise"``.
    """
    flat = list(params)
    checks.options(solver, adjoint, on_failure)
    checks.one_of("variant", variant, VARIANTS)
    checks.tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected (N, B, d), got shape {tuple(x.shape)}")
    checks.groups(x.shape[-1], num_groups)
    size = len(CellParams._fields)
    if len(flat) != size * x.shape[0]:
        raise ValueError(
            f"params: expected {size} tensors for each of {x.shape[0]} cells, got {len(flat)}"
        )
    checks.parameters(flat, x, 2, 6)
    _check_z0(z0, x, "(N, B, d)")
    if present is not None:
        checks.present("present", present, x, (*x.shape[:-1], 1), "(N, B, 1)")
    name = choose_backend(x, num_groups, solver, adjoint, backend)
    if isinstance(adjoint, Unrolled):
        steps = (num_groups, VARIANTS[variant], solver)
        solved = _unrolled(presence.cells, x, flat, detached(z0), present, *steps)
    else:
        options = (num_groups, variant, solver.code, adjoint.code, name, on_failure)
        others = (detached(z0), present)
        solved = Solved(*operators.solve(operators.CELLS, (x,), flat, others, options))
    return solved.z, block_info(solved, reporting.CELLS, solver, on_failure), name


def solve_fuse(
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    params: Sequence[Tensor],  # six, as FuseParams
    *,
    num_modalities: int,
    counts: Tensor | None = None,  # (B, 1)
    mask: Tensor | None = None,  # (B, d)
    num_groups: int = 4,
    variant: VariantName = "paper",
    solver: SolverOption = Anderson(),  # noqa: B008 - frozen
    adjoint: GradientOption = Implicit(),  # noqa: B008 - frozen
    z0: Tensor | None = None,  # (B, d)
    on_failure: OnFailure = "warn",
    backend: BackendName = "auto",
) -> tuple[Tensor, BlockInfo, str]:
    """Equilibrium of the purify-then-combine step for given cell equilibria, per row.

    ``z_f = purify_combine(z_f, z_1* .. z_N*, x_f)``, Eqs. 9-12 of arXiv 2306.16645. The gate is
    linear and the same for all modalities, so of the cells it needs their sum only.

    Args:
        x_fuse: (B, d) injection ``sum_i w_i x_i``, any floating dtype; 16-bit storage is computed
            in float32.
        cell_sum: (B, d) sum of the cells' equilibria ``sum_i z_i*``, on the device of ``x_fuse``.
        params: the six tensors, each (d, d) or (d,), of :func:`purify_combine`, of one dtype.
        num_modalities: N, how many cells ``cell_sum`` adds up.
        counts: (B, 1) int64, how many of the N it adds up in each row, where rows lack modalities.
        mask: (B, d) dropout factors (0 or 1 / (1 - p)), one draw for the whole solve.
        num_groups: groups of the GroupNorm; divides d.
        variant: "paper", "released" or "released-mmimdb", as in :func:`purify_combine`.
        solver: forward solver with its tolerance and budget.
        adjoint: how gradients pass through the equilibrium.
        z0: (B, d) start, zero when not given; no gradient flows to it.
        on_failure: "warn", "raise" or "ignore" when rows do not converge, forward or backward.
        backend: "auto" (the fastest that accepts the problem), or a name.

    Returns:
        The equilibrium (B, d) in the compute dtype (that of ``x_fuse``, at least float32),
        differentiable in ``x_fuse``, ``cell_sum`` and ``params``; its statistics, of shape (B,);
        the name of the backend that ran.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device, number of parameters, or option.
        BackendUnavailable: ``backend`` was named and cannot take the call.
        ConvergenceError: rows failed and ``on_failure="raise"``.
    """
    flat = list(params)
    checks.options(solver, adjoint, on_failure)
    checks.one_of("variant", variant, VARIANTS)
    checks.positive_int("num_modalities", num_modalities)
    checks.tensor("x_fuse", x_fuse)
    if x_fuse.dim() != 2:
        raise ValueError(f"x_fuse: expected (B, d), got shape {tuple(x_fuse.shape)}")
    checks.groups(x_fuse.shape[-1], num_groups)
    checks.operand("cell_sum", cell_sum, x_fuse, tuple(x_fuse.shape), "(B, d)")
    if mask is not None:
        checks.operand("mask", mask, x_fuse, tuple(x_fuse.shape), "(B, d)")
    _check_count(flat, FuseParams)
    checks.parameters(flat, x_fuse, 2, 2)
    _check_z0(z0, x_fuse, "(B, d)")
    if counts is not None:
        checks.counts("counts", counts, x_fuse, (x_fuse.shape[0], 1), "(B, 1)")
        if can_look(counts) and ((counts < 0) | (counts > num_modalities)).any():
            got = f"{int(counts.min())} to {int(counts.max())}"
            raise ValueError(f"counts: expected 0 to num_modalities = {num_modalities}, got {got}")
    name = choose_backend(x_fuse, num_groups, solver, adjoint, backend)
    rows, others = (x_fuse, cell_sum), (mask, detached(z0), counts, num_modalities)
    if isinstance(adjoint, Unrolled):
        steps = (num_groups, VARIANTS[variant], solver)
        solved = _unrolled(presence.fuse, *rows, flat, *others, *steps)
    else:
        options = (num_groups, variant, solver.code, adjoint.code, name, on_failure)
        solved = Solved(*operators.solve(operators.FUSE, rows, flat, others, options))
    return solved.z, block_info(solved, reporting.FUSE, solver, on_failure), name


def require_backend(
    x: Tensor, num_groups: int, solver: SolverOption, adjoint: GradientOption, backend: str
) -> None:
    """Refuse an explicit backend that cannot run here, also where no solve would ask for it."""
    if backend != "auto":
        choose_backend(x, num_groups, solver, adjoint, backend)


def choose_backend(
    x: Tensor, num_groups: int, solver: SolverOption, adjoint: GradientOption, backend: str
) -> str:
    """The backend that takes the problem."""
    if backend == "auto" and isinstance(adjoint, Unrolled):
        backend = "reference"  # the only one whose steps autograd can follow
    problem = backends.Problem(x.device, x.dtype, x.shape[-1], num_groups, solver, adjoint)
    return backends.choose(backend, problem)


@uncompiled(_UNROLLED)
def _unrolled(kind: Callable[[Backend], Launchers], *problem: Any) -> Solved:
    """A solve on the reference path whose steps autograd records; the solver comes last."""
    *operands, solver = problem
    with full_precision(operands[0].device):
        solved: Solved = kind(reference.BACKEND).solve(*operands, solver.settled(rescue=False))
        return solved


def _check_count(params: Sequence[Tensor], kind: type[CellParams] | type[FuseParams]) -> None:
    if len(params) != len(kind._fields):
        raise ValueError(f"params: expected {len(kind._fields)} tensors, got {len(params)}")


def _check_z0(z0: Tensor | None, x: Tensor, meaning: str) -> None:
    if z0 is not None:
        checks.operand("z0", z0, x, tuple(x.shape), meaning)


def detached(z0: Tensor | None) -> Tensor | None:
    return None if z0 is None else z0.detach()
