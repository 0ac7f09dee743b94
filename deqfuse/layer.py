"""The whole layer as functions of tensors, for :class:`deqfuse.DEQFusion`: its solve, its penalty.

Each is one operator. The single blocks and steps are in ``functional.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from deqfuse import checks, operators, reporting
from deqfuse.backends import BackendName, load, presence
from deqfuse.backends.maps import VARIANTS, CellParams, FuseParams, VariantName
from deqfuse.backends.penalty import draw_probes
from deqfuse.backends.problem import SolvedLayer
from deqfuse.functional import choose_backend, detached
from deqfuse.operators.bodies import full_precision
from deqfuse.reporting import OnFailure
from deqfuse.solvers.options import GradientOption, SolverOption
from deqfuse.torch_private import traced, values_of


def solve_layer(
    x: Sequence[Tensor],  # N tensors (B, d)
    params: Sequence[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    z0_fuse: Tensor | None,  # (B, d)
    z0_cells: Tensor | None,  # (N, B, d)
    present: Tensor | None,  # (N, B, 1), bool
    *,
    num_groups: int,
    variant: VariantName,
    solver: SolverOption,
    adjoint: GradientOption,
    on_failure: OnFailure,
    backend: BackendName,
) -> tuple[SolvedLayer, str]:
    """Equilibria of a whole layer in one operator, and the name of the backend that ran.

    For :class:`deqfuse.DEQFusion`, which has looked at the features already. Parameters are looked
    at when a backend could not use them: checking dozens takes as long as a small solve. Not for
    ``Unrolled()``. ``params`` are the list that ``backends/layer.py`` describes.
    """
    checks.options(solver, adjoint, on_failure)
    name = choose_backend(x[0], num_groups, solver, adjoint, backend)
    options = (num_groups, variant, solver.code, adjoint.code, name, on_failure)
    others = (mask, detached(z0_fuse), detached(z0_cells), present)
    try:
        solved = SolvedLayer(*operators.solve(operators.LAYER, x, params, others, options))
    except (RuntimeError, TypeError, AttributeError):
        if not traced(x[0]):
            _check_layer_parameters(x, params)
        raise
    if not traced(x[0]):
        _report(solved, solver, on_failure)
    return solved, name


def prepare_layer(
    like: Tensor,  # (0, d)
    params: Sequence[Tensor],  # backends/layer.py
    *,
    num_groups: int,
    variant: VariantName,
    solver: SolverOption,
    adjoint: GradientOption,
    on_failure: OnFailure,
    backend: BackendName,
) -> tuple[Callable[[list[Tensor], Tensor | None], SolvedLayer], str]:
    """A solve of these parameters for many calls in eager mode, and the backend that it runs on.

    Args:
        like: (0, d), of the dtype and device of the injections.
        params: as :func:`solve_layer` takes them; not to be changed from now on.
        num_groups, variant, solver, adjoint, on_failure, backend: as :func:`solve_layer`.

    Returns:
        ``solve(x, present)``, N tensors (B, d) and (N, B, 1) bool or None, without gradients; and
        the name of the backend.
    """
    checks.options(solver, adjoint, on_failure)
    name = choose_backend(like, num_groups, solver, adjoint, backend)
    num_modalities = (len(params) - len(FuseParams._fields)) // len(CellParams._fields)
    _check_layer_parameters([like] * num_modalities, params)
    held = [p.detach() for p in params]
    launch = presence.prepared(load(name), held, num_groups, VARIANTS[variant], solver)

    def solve(x: list[Tensor], present: Tensor | None) -> SolvedLayer:
        with full_precision(x[0].device):
            solved = launch(x, present)
        _report(solved, solver, on_failure)
        return solved

    return solve, name


def _report(solved: SolvedLayer, solver: SolverOption, on_failure: OnFailure) -> None:
    statistics = values_of(solved.outcome), values_of(solved.residual)
    known = solved.all_converged
    reporting.report(reporting.LAYER, *statistics, solver, on_failure, all_converged=known)


def layer_penalty(
    x: Sequence[Tensor],  # N tensors (B, d)
    params: Sequence[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    present: Tensor | None,  # (N, B, 1), bool
    states: Tensor,  # (N + 1, B, d)
    num_probes: int,
    num_groups: int,
    variant: VariantName,
    backend: str,
    probes: Tensor | None = None,  # (K, N + 1, B, d)
) -> Tensor:
    """Jacobian penalty of a layer that :func:`solve_layer` has solved, in closed form.

    Args:
        x, params, mask, present: as the solve was given them; differentiated in x and params.
        states: (N + 1, B, d) the equilibria that it found, held constant.
        num_probes: Gaussian probes per row and block, drawn from torch's default generator.
        num_groups, variant: as in the solve.
        backend: the name of the backend that ran it.
        probes: in the place of drawn ones, then K = ``num_probes``; held constant.

    Returns:
        Scalar ``sum_b |J_bb^T v|^2 / (B (N + 1) d)``, averaged over the probes; B (N + 1) is the
        number of the blocks' rows, less those of absent cells.
    """
    checks.positive_int("num_probes", num_probes)
    if states.numel() == 0:
        return states.new_zeros(())
    states = states.detach()
    if probes is None:
        probes = draw_probes(states, num_probes)
    options = (num_groups, variant, backend)
    total = operators.penalty_layer(probes, states, x, params, mask, present, options)
    if present is None:
        return total / probes.numel()
    return total / ((present.sum() + states.shape[1]) * num_probes * states.shape[-1])


def _check_layer_parameters(x: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """What is wrong with the parameters that a backend could not use, if they are what is wrong."""
    cells = len(x) * len(CellParams._fields)
    if any(hasattr(p, "full_tensor") for p in params):
        raise TypeError(
            "params: expected plain tensors, got sharded ones (DTensor). Remedy: give "
            "fully_shard the layer as one module; it reads its cells' parameters itself"
        ) from None
    checks.parameters(params[:cells], x[0], 2, 6)
    checks.parameters(params[cells : cells + len(FuseParams._fields)], x[0], 2, 2)
