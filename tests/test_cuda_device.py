"""The CUDA adjoint on a GPU, against the CPU backend. `make gpu` runs it, and the sanitizers."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from cpu_cases import Case, named
from cuda_cases import Problem, distance

from deqfuse import Outcome
from deqfuse.backends import cuda_native, native
from deqfuse.backends.maps import VARIANTS

pytestmark = pytest.mark.gpu

# By width: weights in shared memory, streamed, steps; odd numbers of rows, features and groups.
SHAPES = [
    Case(rows=0),
    *(Case(rows=rows, dim=d, groups=g, n=n) for rows, d, g, n in (
        (1, 4, 2, 1), (17, 12, 4, 2), (33, 50, 2, 3), (40, 64, 4, 3), (33, 128, 4, 2),
        (9, 93, 31, 17), (33, 200, 4, 2), (50, 256, 4, 3), (33, 300, 4, 2), (70, 500, 4, 3),
    )),
]  # fmt: skip


@pytest.fixture(autouse=True)
def library() -> None:
    if (missing := cuda_native.load_error()) is not None:
        pytest.fail(missing)


def on_device(problem: Problem, kind: str) -> tuple:
    return tuple(
        [t.cuda() for t in a] if isinstance(a, list) else None if a is None else a.cuda()
        for a in getattr(problem, kind)
    )


def run(problem: Problem, kind: str, given: tuple | None = None, **options):
    found, statistics = problem.run(
        kind, cuda_native, given=given or on_device(problem, kind), **options
    )
    return {name: t.cpu() for name, t in found.items()}, [t.cpu() for t in statistics]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["cells", "fuse"])
@pytest.mark.parametrize("case", **named(SHAPES))
def test_float64_gradients_are_those_of_the_cpu_backend(case, kind, variant):
    problem = Problem(dataclasses.replace(case, variant=variant), mask=variant != "paper")
    expected, before = problem.run(kind, native)
    given, (_, _, outcome) = run(problem, kind)
    if (before[2] == Outcome.CONVERGED).all() and (outcome == Outcome.CONVERGED).all():
        assert distance(given, expected) <= (1e-9 if case.dim // case.groups > 2 else 1e-7)
    else:
        assert case.dim // case.groups <= 2


@pytest.mark.parametrize("kind", ["cells", "fuse"])
@pytest.mark.parametrize("case", **named(c for c in SHAPES if c.dim // c.groups > 3 and c.rows))
def test_float32_is_as_exact_as_the_cpu_backend(case, kind):
    problem = Problem(dataclasses.replace(case, dtype="f32"), mask=True)
    truth, _ = problem.run(kind, native, dtype=torch.float64, tol=1e-13)
    ours = distance(problem.run(kind, native)[0], truth)
    given, (*_, outcome) = run(problem, kind)
    assert (outcome == Outcome.CONVERGED).all()
    assert distance(given, truth) <= 4 * ours + 64 * torch.finfo(torch.float32).eps
    _, (residual, _, outcome) = run(problem, kind, tol=1e-3, allow_tf32=True)
    assert (outcome == Outcome.CONVERGED).all()
    assert (residual <= 1e-3).all()


@pytest.mark.parametrize("kind", ["cells", "fuse"])
@pytest.mark.parametrize("dim", [64, 256, 300])
def test_it_never_waits_and_can_be_captured(kind, dim):
    """A CUDA graph's replay gives the bits of the call, on new values in the same memory."""
    problem = Problem(Case(rows=33, dim=dim, groups=4, dtype="f32"))
    given = on_device(problem, kind)
    expected, _ = run(problem, kind, given)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        problem.run(kind, cuda_native, given=given)  # cuBLAS sets itself up
    stream.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        problem.run(kind, cuda_native, given=given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):  # fails if anything waits that the mode does not see
        captured, _ = problem.run(kind, cuda_native, given=given)
    given[0].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured["dx"].cpu(), 2 * expected["dx"])


@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_tensors_elsewhere_are_refused(kind):
    problem = Problem(Case())
    given = list(on_device(problem, kind))
    given[2] = given[2].cpu()
    with pytest.raises(RuntimeError, match="on the device of the equilibria"):
        problem.run(kind, cuda_native, given=tuple(given))
