"""Triton kernels on NVIDIA GPUs: whole solves in one launch, or fused steps.

Which kernel runs which problem:

    float32 or 16-bit storage, at most 128 tile columns, m <= 5, no trace,
    and two weights fit a block's shared memory                               one launch a solve
    everything else that is not refused                                       fused steps

Adjoints: cuda_adjoint.py; the Jacobian penalty: cuda_penalty.py. The kernels, and Triton with them,
are imported when a solve asks for them: a bare checkout has none.
"""

from __future__ import annotations

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deqfuse.backends import cuda_adjoint, cuda_penalty, layer
from deqfuse.backends.arguments import aligned, aligned_all
from deqfuse.backends.backend import Backend, Launchers
from deqfuse.backends.layer import LayerParams
from deqfuse.backends.maps import Variant
from deqfuse.backends.presence import only
from deqfuse.backends.problem import Problem, Solved, SolvedLayer, compute_dtype
from deqfuse.backends.rescue import rescue_cells, rescue_fuse
from deqfuse.solvers.anderson import Anderson, Picard
from deqfuse.solvers.derivatives import Map
from deqfuse.solvers.options import SolverOption, Unrolled
from deqfuse.solvers.rows import Solution

if TYPE_CHECKING:
    from deqfuse.triton_kernels.tiles import Knobs

MIN_CAPABILITY = (8, 0)


def unavailable() -> tuple[str, str] | None:
    """Why this backend cannot run here, and what would change that."""
    if _MISSING is not None:
        return _MISSING
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU", "an NVIDIA GPU and its driver"
    return None


def _missing() -> tuple[str, str] | None:
    """What is missing whatever the machine."""
    if torch.version.hip:
        return "its launches have been written for NVIDIA GPUs only", "none in this version"
    if importlib.util.find_spec("deqfuse.triton_kernels") is None:
        return (
            "deqfuse is imported from a bare checkout, without deqfuse.triton_kernels",
            "pip install --no-build-isolation -e . in the checkout",
        )
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed", "pip install 'deqfuse[triton]'"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA",
            "a CUDA build of torch and an NVIDIA GPU",
        )
    return None


# Nothing of it changes while the process lives, and "auto" asks at every call. Found out at import,
# since not every Dynamo can trace a search for modules, and none traces a cache without a warning.
_MISSING = _missing()


def refuses(problem: Problem) -> str | None:
    """Why this backend cannot take the problem."""
    if problem.device.type != "cuda":
        return f"it runs on CUDA tensors, not {problem.device}"
    capability = torch.cuda.get_device_capability(problem.device)
    if capability < MIN_CAPABILITY:
        return f"it needs compute capability 8.0 or later, not {'.'.join(map(str, capability))}"
    return refuses_problem(problem)


def refuses_problem(problem: Problem) -> str | None:
    """As :func:`refuses`, whatever the device."""
    from deqfuse.triton_kernels import tiles

    solver = problem.solver
    if not isinstance(solver, (Anderson, Picard)):
        return f"it solves with Anderson or Picard, not {type(solver).__name__}"
    if isinstance(solver, Anderson) and solver.m > tiles.MAX_STEP_HISTORY:
        return f"it keeps at most {tiles.MAX_STEP_HISTORY} residuals, not Anderson(m={solver.m})"
    if isinstance(problem.adjoint, Unrolled):
        return "it does not differentiate through its steps, as Unrolled asks"
    if not tiles.fits_steps(problem.dim, problem.num_groups):
        width = problem.dim // problem.num_groups
        return f"it takes groups of at most {tiles.MAX_GROUP} channels, not {width}"
    if problem.dim > tiles.MAX_DIM:
        return f"it takes at most {tiles.MAX_DIM} features, not {problem.dim}"
    return _refuses_steps(problem)


def _refuses_steps(problem: Problem) -> str | None:
    """Steps are launched up to the last one, wanted or not: a budget is a number of launches."""
    from deqfuse.triton_kernels import tiles

    device, dtype, dim, num_groups, *options = problem
    for option in options:
        knob = "max_iter" if hasattr(option, "max_iter") else "k"
        steps = getattr(option, knob, 0)
        if steps <= tiles.MAX_STEPS or _fits_one_launch(
            device, dtype, dim, num_groups, problem.solver
        ):
            continue
        asked = f"{type(option).__name__}({knob}={steps})"
        return f"it launches every step here, {tiles.MAX_STEPS} at most, and not those of {asked}"
    return None


def one_launch(x: Tensor, num_groups: int, solver: SolverOption) -> bool:
    """Whether the solve of features like ``x`` (..., d) is one launch, or steps."""
    return _fits_one_launch(x.device, x.dtype, x.shape[-1], num_groups, solver)


def _fits_one_launch(
    device: torch.device, dtype: torch.dtype, dim: int, num_groups: int, solver: SolverOption
) -> bool:
    from deqfuse.triton_kernels import tiles

    shared = _shared_bytes(device) if device.type == "cuda" else tiles.SHARED_BYTES
    return not solver.trace and tiles.fits_solve(dim, num_groups, dtype, _knobs(solver).m, shared)


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may have: a multiprocessor's less 1 KB, which CUDA keeps."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 1024


def solve_cells(
    x: Tensor,  # (N, B, d)
    flat_params: list[Tensor],
    z0: Tensor | None,  # (N, B, d)
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
    present: Tensor | None = None,  # (N, B), bool
) -> Solved:
    """Equilibria of all N residual cells, or of those that are present."""
    from deqfuse.triton_kernels import cell, solve, stepped

    dtype, knobs, skip = compute_dtype(x.dtype), _knobs(solver), variant.skip
    x, z0 = aligned(x), aligned(z0)
    with _on(x):
        packed = cell.pack_cells(flat_params)
        if one_launch(x, num_groups, solver):
            found = solve.solve_cells(x, packed, z0, num_groups, skip, knobs, present), None
        else:
            rest = (num_groups, skip, dtype, knobs, solver.trace, present)
            found = stepped.solve_cells(x, packed, z0, *rest)
    solved = _solved(*found, solver)
    if not (isinstance(solver, Anderson) and solver.rescue):
        return solved
    return rescue_cells(solved, x, flat_params, num_groups, variant, solver)


def solve_fuse(
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    flat_params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    z0: Tensor | None,  # (B, d)
    num_modalities: int,
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
    counts: Tensor | None = None,  # (B,), compute dtype; rows' own numbers of modalities
) -> Solved:
    """Equilibrium of the purify-then-combine step, the cells' equilibria held fixed."""
    from deqfuse.triton_kernels import solve, stepped

    dtype, knobs = compute_dtype(x_fuse.dtype), _knobs(solver)
    x, cell_sum, mask, z0 = (aligned(t) for t in (x_fuse, cell_sum, mask, z0))
    params = aligned_all(flat_params)
    shape = (num_modalities, num_groups, variant.relu_last)
    with _on(x):
        if one_launch(x, num_groups, solver):
            whole = (mask, z0, *shape, knobs, counts)
            found = solve.solve_fuse(x, cell_sum, params, *whole), None
        else:
            rest = (*shape, dtype, knobs, solver.trace, counts)
            found = stepped.solve_fuse(x, cell_sum, params, mask, z0, *rest)
    solved = _solved(*found, solver)
    if not (isinstance(solver, Anderson) and solver.rescue):
        return solved
    return rescue_fuse(
        solved, x, cell_sum, params, mask, num_modalities, num_groups, variant, solver
    )


def solve_layer(
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    z0_fuse: Tensor | None,  # (B, d)
    z0_cells: Tensor | None,  # (N, B, d)
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
    present: Tensor | None = None,  # (N, B), bool
) -> SolvedLayer:
    """Equilibria of all cells and of the fuse step: two launches, and two that pack."""
    from deqfuse.triton_kernels import cell, solve

    like = x[0]
    rescue = isinstance(solver, Anderson) and solver.rescue  # between the blocks
    if rescue or not one_launch(like, num_groups, solver):
        return layer.solve(
            solve_cells, solve_fuse,
            x, flat_params, mask, z0_fuse, z0_cells, num_groups, variant, solver,
        )  # fmt: skip
    params = LayerParams.split(flat_params, len(x))
    mask, z0_fuse, z0_cells = (aligned(t) for t in (mask, z0_fuse, z0_cells))
    with _on(like):
        z, both = solve.solve_layer(
            torch.stack(list(x)), cell.pack_cells(params.cells),
            aligned_all(params.fuse), aligned(params.weights), aligned(params.bias),
            mask, z0_fuse, z0_cells,
            num_groups, variant.skip, variant.relu_last,
            _knobs(solver), present,
        )  # fmt: skip
    return SolvedLayer(z, *_solved(both, None, solver))


def solve_present(
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    z0_fuse: Tensor | None,  # (B, d)
    z0_cells: Tensor | None,  # (N, B, d)
    present: Tensor,  # (N, B, 1), bool
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
) -> SolvedLayer | None:
    """Equilibria of what is present, as :func:`solve_layer` launches them; nobody looks at a mask.

    None where rows are to be rescued.
    """
    if isinstance(solver, Anderson) and solver.rescue:
        return None
    operands = flat_params, mask, z0_fuse, z0_cells, num_groups, variant, solver
    here = aligned(present[..., 0])
    if one_launch(x[0], num_groups, solver):
        return solve_layer(x, *operands, present=here)
    counts = here.sum(0, dtype=compute_dtype(x[0].dtype))
    return layer.solve(
        functools.partial(solve_cells, present=here), functools.partial(solve_fuse, counts=counts),
        only(x, present), *operands,
    )  # fmt: skip


def anderson(f: Map, z0: Tensor, option: Anderson) -> Solution:
    """Anderson mixing on rows (R, n) of any map, one launch per evaluation.

    The map runs in Python, so the host has to ask after every evaluation whether to go on.
    """
    from deqfuse.triton_kernels.anderson import AndersonState, anderson_step

    state = AndersonState(z0, option.m, option.max_iter if option.trace else 0)
    state.z.copy_(z0)
    if state.trace is not None:
        state.trace.fill_(torch.nan)
    step = 0
    with _on(z0):
        while step == 0 or bool(state.active.any()):
            anderson_step(
                aligned(f(state.z)), state, step,
                tol=option.tol, max_iter=option.max_iter, beta=option.beta, lam=option.lam,
            )  # fmt: skip
            step += 1
    trace = None if state.trace is None else state.trace[:step]
    return Solution(state.best, state.best_residual, state.nfe, state.outcome, trace)


def unit_size(x: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Rows of unit size, or their gradient: one launch for each modality."""
    from deqfuse.triton_kernels import unit

    with _on(x[0]):
        if not grads:
            return [unit.unit_size(aligned(t), None) for t in x]
        pairs = zip(aligned_all(x), aligned_all(grads), strict=True)
        return [unit.unit_size(t, grad) for t, grad in pairs]


def captures_solve(problem: Problem) -> bool:
    """Whole solves: steps keep memory for the next one, the rescue looks at the rows left over."""
    rescue = isinstance(problem.solver, Anderson) and problem.solver.rescue
    return not rescue and _fits_one_launch(*problem[:5])


def release_graphs() -> None:
    """Free what solves by steps keep between calls: up to eight kinds, with a CUDA graph each.

    A kind holds its operands and its state, at most 256 MiB. It is made anew when it is solved the
    next time: once step by step, once captured, and replayed from then on.
    """
    from deqfuse.triton_kernels import graphs

    graphs.release()


def takes_rows(z0: Tensor, solver: SolverOption) -> bool:
    """Whether :func:`anderson` can run this solve."""
    if unavailable() is not None:
        return False
    from deqfuse.triton_kernels import tiles

    return (
        z0.is_cuda
        and z0.dtype in (torch.float32, torch.float64)
        and isinstance(solver, Anderson)
        and solver.m <= tiles.MAX_STEP_HISTORY
        and torch.cuda.get_device_capability(z0.device) >= MIN_CAPABILITY
    )


BACKEND = Backend(
    summary="Triton kernels on NVIDIA GPUs: whole solves in one launch, or fused steps.",
    unavailable=unavailable,
    refuses=refuses,
    cells=Launchers(solve_cells, cuda_adjoint.adjoint_cells),
    fuse=Launchers(solve_fuse, cuda_adjoint.adjoint_fuse),
    layer=Launchers(solve_layer, cuda_adjoint.adjoint_layer),
    penalty=cuda_penalty.penalty_layer,
    takes_rows=takes_rows,
    anderson=anderson,
    captures_solve=captures_solve,
    captures_adjoint=cuda_adjoint.library_takes,
    solve_present=solve_present,
    adjoint_present=cuda_adjoint.adjoint_present,
    penalty_present=cuda_penalty.penalty_present,
    unit_size=unit_size,
)


def _knobs(solver: SolverOption) -> Knobs:
    """A solver's options as the kernels take them."""
    from deqfuse.triton_kernels import tiles

    if isinstance(solver, Anderson):
        return tiles.Knobs(solver.tol, solver.max_iter, solver.m, solver.beta, solver.lam)
    assert isinstance(solver, Picard)
    return tiles.Knobs(solver.tol, solver.max_iter, 1, solver.beta, 0.0)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """The device of ``x`` as the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _solved(
    answer: tuple[Tensor, Tensor, Tensor, Tensor], trace: Tensor | None, solver: SolverOption
) -> Solved:
    """An answer of the kernels as an operator's output, whose trace has a fixed length."""
    z, residual, nfe, outcome = answer
    if trace is None:
        trace = residual.new_empty((0, *residual.shape))
    return Solved(z, residual, nfe, outcome, trace)
