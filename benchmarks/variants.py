"""Every way of computing the layer that is timed: the same weights, the same equations.

A contender knows how to compute the fused output (timed), and how to show its full answer with the
evaluations it took (for the gate). To add one, write a builder and list it in ``BUILDERS``.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import ADJOINT_MAX_ITER, MAX_ITER, Problem
from benchmarks.plain import cells_step, collapsed_step, flat_map, joint_map, squared_pull
from benchmarks.released import (
    attach_gradient,
    joint_anderson,
    joint_implicit,
    joint_penalized,
)
from deqfuse import Anderson, Implicit, backends, functional
from deqfuse.backends import maps
from deqfuse.backends.penalty import draw_probes
from deqfuse.result import BlockInfo
from deqfuse.solvers.adjoint import solve_adjoint


class Answer(NamedTuple):
    """What a contender found. Evaluations are per row of a block; a joint solver has one count."""

    z: Tensor  # (B, d)
    cells: Tensor  # (N, B, d)
    nfe_cells: Tensor  # (N, B), or () of a joint solver
    nfe_fuse: Tensor  # (B,), or ()


Features = Sequence[Tensor]  # N tensors (B, d)


@dataclass(frozen=True)
class Penalized:
    """The forward of a training step with the Jacobian penalty: one Gaussian probe."""

    # The fused output (B, d) and the penalty ``sum_b |J_bb^T v|^2 / (B (N + 1) d)``, of one graph.
    run: Callable[[Features], tuple[Tensor, Tensor]]
    # (N + 1, B, d): the probes that `run`, called now, would draw from torch's generator.
    probes: Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """A variant on one problem at one tolerance."""

    name: str
    fused: Callable[[Features], Tensor]  # differentiable (B, d)
    answer: Callable[[Features], Answer]  # without gradients
    differentiable: bool = True
    penalized: Penalized | None = None


def deqfuse_variant(backend: str) -> Callable[[Problem, float], Contender]:
    """The layer itself on a named backend."""

    def build(problem: Problem, tol: float) -> Contender:
        layer = copy.copy(problem.layer)  # shares the parameters
        # Everybody has the same budget: no rescue of rows that are out of reach.
        layer.solver = Anderson(tol=tol, max_iter=MAX_ITER, m=problem.case.m, rescue=False)
        layer.adjoint = Implicit(tol=tol, max_iter=ADJOINT_MAX_ITER)
        layer.backend = backend

        def answer(features: Features) -> Answer:
            z, cells, info = layer(features, return_cells=True, return_info=True)
            assert info.backend == backend
            return Answer(z, cells, info.cells.nfe, info.fuse.nfe)

        def run(features: Features) -> tuple[Tensor, Tensor]:
            z, info = layer(features, return_info=True)
            return z, info.jacobian_penalty()

        penalized = Penalized(run, lambda: draw_probes(_states(problem), 1)[0])
        return Contender(f"deqfuse-{backend}", layer, answer, penalized=penalized)

    return build


def _states(problem: Problem) -> Tensor:
    """(N + 1, B, d), like a state of the problem."""
    x = problem.features[0]
    return torch.empty((problem.case.modalities + 1, *x.shape), dtype=x.dtype, device=x.device)


def _joint_probes(problem: Problem) -> Tensor:
    """(N + 1, B, d) as drawn at once for a joint state (B, (N + 1) d)."""
    like = _states(problem)
    rows = torch.randn_like(like.transpose(0, 1).flatten(1))
    return rows.unflatten(1, (len(like), -1)).transpose(0, 1)


def _split(state: Sequence[Tensor], calls: Sequence[None]) -> Answer:
    """From z_1 .. z_N, z_f and the evaluations that were counted."""
    nfe = torch.tensor(len(calls))
    return Answer(state[-1], torch.stack(list(state[:-1])), nfe, nfe)


def counted(f: Callable[..., Any]) -> tuple[Callable[..., Any], list[None]]:
    """``f`` and a list that grows by one per call: nobody's own count is taken for it."""
    calls: list[None] = []

    def counting(*state: Tensor) -> Any:
        calls.append(None)
        return f(*state)

    return counting, calls


def released(problem: Problem, tol: float) -> Contender:
    """The released code's algorithm (benchmarks/released.py) on the plain map."""
    layer = problem.layer

    def solve(f: Callable[[Tensor], Tensor], z0: Tensor) -> Sequence[Tensor]:
        state = joint_implicit(f, z0, tol, MAX_ITER, ADJOINT_MAX_ITER)[0]
        return state.split(layer.dim, dim=1)

    def answer(features: Features) -> Answer:
        f, z0 = flat_map(layer, features)
        f, calls = counted(f)
        return _split(solve(f, z0), calls)

    def run(features: Features) -> tuple[Tensor, Tensor]:
        limits = (tol, MAX_ITER, ADJOINT_MAX_ITER)
        state, penalty = joint_penalized(*flat_map(layer, features), layer.dim, *limits)
        return state[:, -layer.dim :], penalty

    penalized = Penalized(run, lambda: _joint_probes(problem))
    fused = lambda features: solve(*flat_map(layer, features))[-1]  # noqa: E731
    return Contender("released", fused, answer, penalized=penalized)


def torchdeq(problem: Problem, tol: float) -> Contender:
    """torchdeq 0.1 on the plain map: its Anderson on the joint state, its implicit gradient.

    Its penalty, ``jac_reg``, is given an evaluation at the detached equilibrium: the graph of its
    own last evaluation is not to be had.
    """
    from torchdeq import get_deq  # type: ignore[import-untyped]
    from torchdeq.loss import jac_reg  # type: ignore[import-untyped]

    layer = problem.layer
    deq = get_deq(
        f_solver="anderson", f_max_iter=MAX_ITER, f_tol=tol, f_stop_mode="rel",
        b_solver="anderson", b_max_iter=ADJOINT_MAX_ITER, b_tol=tol, b_stop_mode="rel", ift=True,
    )  # fmt: skip

    def solve(step: Callable[..., Any], start: Any) -> Sequence[Tensor]:
        deq.train(torch.is_grad_enabled())  # in training it evaluates f once more, for the gradient
        (*_, state), _ = deq(step, start)
        return tuple(state)

    def answer(features: Features) -> Answer:
        step, start = joint_map(layer, features)
        step, calls = counted(step)  # its own count is that of the best step
        return _split(solve(step, start), calls)

    def run(features: Features) -> tuple[Tensor, Tensor]:
        blocks = solve(*joint_map(layer, features))
        state = torch.cat(blocks, dim=1).detach().requires_grad_()
        image = flat_map(layer, features)[0](state, seen=state[:, : -layer.dim].detach())
        return blocks[-1], jac_reg(image, state, vecs=1)

    penalized = Penalized(run, lambda: _joint_probes(problem))
    fused = lambda features: solve(*joint_map(layer, features))[-1]  # noqa: E731
    return Contender("torchdeq", fused, answer, penalized=penalized)


def compiled(problem: Problem, tol: float) -> Contender:
    """One step of the cells and one of the fuse equation under torch.compile, in deqfuse's solver.

    That is what torch.compile gives a user of this library: fused element-wise passes around the
    products, deqfuse's own Anderson step, row-wise stopping, block order and the collapsed gate.
    """
    layer, case = problem.layer, problem.case
    cell_map, fuse_map, cell_penalty, fuse_penalty = _compiled_maps()
    option = Anderson(tol=tol, max_iter=MAX_ITER, m=case.m)
    adjoint = Implicit(tol=tol, max_iter=ADJOINT_MAX_ITER)

    def equilibrium(compiled_map: Any, *operands: Any) -> tuple[Tensor, BlockInfo]:
        """Of the map as a function of z; operands[0] gives its shape."""
        shape, fixed = operands[0].shape, _detached(operands)

        def f(z: Tensor, used: Any = operands) -> Tensor:
            return compiled_map(z.view(shape), *used).view(z.shape)

        def frozen(z: Tensor) -> Tensor:
            # A compiled backward computes all gradients that its graph has: here the one that is
            # wanted, or every J^T u would come with the gradients of the weights.
            return f(z, fixed)

        zero = torch.zeros_like(fixed[0]).flatten(0, -2)
        with torch.no_grad():
            z, info, _ = functional.fixed_point(frozen, zero, solver=option, on_failure="ignore")
        if torch.is_grad_enabled():
            leaf = z.detach().requires_grad_()
            inner = frozen(leaf)

            def vjp(u: Tensor) -> Tensor:
                return torch.autograd.grad(inner, leaf, u, retain_graph=True)[0]

            z = attach_gradient(f(leaf), lambda g: solve_adjoint(vjp, g, adjoint).z)
        return z.view(shape), info

    def solve(features: Features, probes: Tensor | None = None) -> Any:
        x = torch.stack(list(features))
        n, groups = case.modalities, case.num_groups
        weights: Any = tuple(tuple(cell.flat()) for cell in layer.cells)  # type: ignore[operator]
        if not ONE_GRAPH:
            weights = maps.CellParams.stack([t for own in weights for t in own])
        cells, cells_info = equilibrium(cell_map, x, weights, groups)
        assert layer.combine is not None
        fuse = maps.FuseParams(*layer.combine.flat())
        x_fuse = (layer.modality_weights[:, None, None] * x).sum(0)
        constant = maps.gate_constant(cells.sum(0), n, fuse)
        z, info = equilibrium(fuse_map, x_fuse, constant, n, fuse, groups)
        if probes is None:
            return z, cells, cells_info, info
        # The equilibrium is held constant, in the gate's constant as well.
        constant = maps.gate_constant(cells.detach().sum(0), n, fuse)
        penalty = cell_penalty(probes[:-1], cells.detach(), x, weights, groups)
        penalty = penalty + fuse_penalty(probes[-1], z.detach(), x_fuse, constant, n, fuse, groups)
        return z, penalty / probes.numel()

    def answer(features: Features) -> Answer:
        z, cells, cells_info, info = solve(features)
        return Answer(z, cells, cells_info.nfe.view(case.modalities, -1), info.nfe)

    penalized = Penalized(
        lambda features: solve(features, torch.randn_like(_states(problem))),
        lambda: torch.randn_like(_states(problem)),
    )
    return Contender("compiled", lambda features: solve(features)[0], answer, penalized=penalized)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        inner = map(_detached, value)
        return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
    return value


# One graph for all sizes takes half a minute to compile. With False every size has its own, which
# is the faster code and takes as long per case: `make bench-full` does that.
ONE_GRAPH = True
_maps: list[Any] = []


def _compiled_maps() -> Any:
    if not _maps:
        # VJPs run through the compiled graph many times; its buffers must outlive the first.
        import torch._functorch.config as functorch_config

        functorch_config.donated_buffer = False
        torch._dynamo.config.force_parameter_static_shapes = False
        torch._dynamo.config.recompile_limit = 256
        # Whichever is faster: a graph for all sizes is slow on batched products and grouped means
        # (2 times at d = 256), a graph per size is a fifth faster with them.
        cell_map = cells_step if ONE_GRAPH else maps.residual_cell
        for f in (cell_map, collapsed_step):
            _maps.append(torch.compile(f, dynamic=ONE_GRAPH))
        for f in (cell_map, collapsed_step):
            penalty = functools.partial(squared_pull, f)
            _maps.append(torch.compile(penalty, dynamic=ONE_GRAPH))
    return _maps


def cuda_graph(problem: Problem, tol: float) -> Contender:
    """The released algorithm captured once with a fixed number of evaluations: forward only."""
    layer = problem.layer
    static = [x.detach().clone() for x in problem.features]
    f, z0 = flat_map(layer, static)
    with torch.no_grad():
        steps = joint_anderson(f, z0, tol, MAX_ITER)[1]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            joint_anderson(*flat_map(layer, static), None, steps)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            state = joint_anderson(*flat_map(layer, static), None, steps)[0]

    def replay(features: Features) -> Answer:
        for own, given in zip(static, features, strict=True):
            own.copy_(given)
        graph.replay()
        return _split(state.split(layer.dim, dim=1), [None] * steps)

    return Contender("cuda-graph", lambda features: replay(features).z, replay, False)


BUILDERS: dict[str, Callable[[Problem, float], Contender]] = {
    **{f"deqfuse-{name}": deqfuse_variant(name) for name in backends.BACKENDS},
    "released": released,
    "torchdeq": torchdeq,
    "compiled": compiled,
    "cuda-graph": cuda_graph,
}
OURS = tuple(name for name in BUILDERS if name.startswith("deqfuse-"))


def missing(name: str) -> str | None:
    """Why a variant cannot run on this machine and the run's device; None if it can."""
    only = {"deqfuse-cpu": "cpu", "deqfuse-cuda": "cuda", "cuda-graph": "cuda"}.get(name)
    if only is not None and only != cases.DEVICE:
        return f"it runs on {only}, this run is on {cases.DEVICE}"
    if name in OURS:
        status = {s.name: s for s in backends.describe()}[name.removeprefix("deqfuse-")]
        return None if status.available else status.reason
    if name == "torchdeq" and importlib.util.find_spec("torchdeq") is None:
        return "torchdeq is not installed: pip install 'deqfuse[bench]'"
    return None


def available() -> list[str]:
    """The variants that can run here."""
    return [name for name in BUILDERS if missing(name) is None]


def fastest_backend() -> str:
    """The variant that ``backend="auto"`` would take here."""
    return next(name for name in OURS if missing(name) is None)
