"""The CUDA adjoint on a GPU, against the CPU backend; its promises are in test_cuda_adjoint.py.

`make gpu` runs both, and the sanitizers.
"""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from cpu_cases import Case, flat_cells, named
from cuda_cases import Machine, Problem, distance

from deqfuse import Outcome
from deqfuse.backends import cpu_native, cuda_native
from deqfuse.backends.maps import VARIANTS

# By width: weights in shared memory, streamed, steps; odd numbers of rows, features and groups.
SHAPES = [
    Case(rows=0),
    *(Case(rows=rows, dim=d, groups=g, n=n) for rows, d, g, n in (
        (1, 4, 2, 1), (17, 12, 4, 2), (33, 50, 2, 3), (40, 64, 4, 3), (33, 128, 4, 2),
        (9, 93, 31, 17), (33, 200, 4, 2), (50, 256, 4, 3), (33, 300, 4, 2), (70, 500, 4, 3),
    )),
]  # fmt: skip


GPU = Machine("cuda")


def on_machines(shapes: list[Case]) -> list:
    """A GPU takes all of them, the host policy the small ones."""
    small = [(Machine("cpu"), case) for case in shapes if case.rows * case.dim <= 3000]
    large = [pytest.param(GPU, case, marks=pytest.mark.gpu) for case in shapes]
    return small + large


def in_case(value: object) -> str | None:
    return named([value])["ids"][0] if isinstance(value, Case) else None


on_all_shapes = pytest.mark.parametrize(("machine", "case"), on_machines(SHAPES), ids=in_case)
smooth = [c for c in SHAPES if c.dim // c.groups > 3 and c.rows]
on_smooth_shapes = pytest.mark.parametrize(("machine", "case"), on_machines(smooth), ids=in_case)
each_kind = pytest.mark.parametrize("kind", ["cells", "fuse"])


@pytest.mark.parametrize("variant", VARIANTS)
@each_kind
@on_all_shapes
def test_float64_gradients_are_those_of_the_cpu_backend(machine, case, kind, variant):
    problem = Problem(dataclasses.replace(case, variant=variant), mask=variant != "paper")
    expected, before = problem.run(kind, cpu_native)
    given, (_, _, outcome) = machine.run(problem, kind)
    if (before[2] == Outcome.CONVERGED).all() and (outcome == Outcome.CONVERGED).all():
        assert distance(given, expected) <= (1e-9 if case.dim // case.groups > 2 else 1e-7)
    else:
        assert case.dim // case.groups <= 2


@each_kind
@on_smooth_shapes
def test_float32_is_as_exact_as_the_cpu_backend(machine, case, kind):
    problem = Problem(dataclasses.replace(case, dtype="f32"), mask=True)
    truth, _ = problem.run(kind, cpu_native, dtype=torch.float64, tol=1e-13)
    ours = distance(problem.run(kind, cpu_native)[0], truth)
    given, (*_, outcome) = machine.run(problem, kind)
    assert (outcome == Outcome.CONVERGED).all()
    assert distance(given, truth) <= 4 * ours + 64 * torch.finfo(torch.float32).eps
    _, (residual, _, outcome) = machine.run(problem, kind, tol=1e-3, allow_tf32=True)
    assert (outcome == Outcome.CONVERGED).all()
    assert (residual <= 1e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 256], ids=["resident", "streamed"])
@pytest.mark.parametrize(
    ("device", "numbers"),
    [("cpu", 10_000), pytest.param("cuda", 2**31, marks=pytest.mark.gpu)],
    ids=["cpu", "cuda"],
)
def test_offsets_beyond_31_bits(device, numbers, dim):
    """The last rows are computed where they lie. One tensor serves as all operands: 35 GB."""
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs a GPU with 40 GB")
    rows = numbers // dim + 100
    layer = Case(dim=dim, groups=4, dtype="f32").layer().requires_grad_(False).to(device)
    z = torch.randn(1, rows, dim, device=device)
    tail, last = z[:, -40:].clone(), slice(rows - 40, rows)
    how = (-1, 1e-3, 50, 6, 1.0, 1e-6)
    params = flat_cells(layer)[:10]
    call = [cuda_native.adjoint_cells(t, t, t, params, False, 4, False, *how)[0] for t in (z, tail)]
    assert torch.equal(call[0][:, last], call[1])
    del call
    fuse = layer.combine.flat()
    found = [
        cuda_native.adjoint_fuse(t, t, t, t, fuse, False, None, 2, 4, False, *how)
        for t in (z[0], tail[0])
    ]
    for given, wanted in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(given[last], wanted)


# ---- what only a GPU has -------------------------------------------------------------------------


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("dim", [64, 256, 300])
def test_it_never_waits_and_can_be_captured(kind, dim):
    """A CUDA graph's replay gives the bits of the call, on new values in the same memory."""
    problem = Problem(Case(rows=33, dim=dim, groups=4, dtype="f32"))
    given = GPU.place(getattr(problem, kind))
    expected, _ = GPU.run(problem, kind, given=given)
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


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("dim", [64, 256, 300])
def test_it_runs_on_the_current_stream(kind, dim):
    """Its operand arrives late on that stream; a kernel on another one would not wait for it."""
    problem = Problem(Case(rows=33, dim=dim, groups=4, dtype="f32"))
    given = GPU.place(getattr(problem, kind))
    expected, _ = GPU.run(problem, kind, given=given)
    late, stream = given[0].clone(), torch.cuda.Stream()
    given[0].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        given[0].copy_(late)
        found, _ = problem.run(kind, cuda_native, given=given)
    stream.synchronize()
    for name, wanted in expected.items():
        assert torch.equal(found[name].cpu(), wanted), name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_kind
@pytest.mark.parametrize("dim", [64, 256, 300])
def test_a_device_that_is_not_the_current_one(kind, dim):
    problem = Problem(Case(rows=33, dim=dim, groups=4, dtype="f32"))
    other = Machine("cuda:1")
    found, _ = problem.run(kind, cuda_native, given=other.place(getattr(problem, kind)))
    assert {t.device.index for t in found.values()} == {1}
    assert torch.cuda.current_device() == 0
    expected, _ = GPU.run(problem, kind)
    for name, wanted in expected.items():
        assert torch.equal(found[name].cpu(), wanted), name


@pytest.mark.gpu
@each_kind
def test_tensors_elsewhere_are_refused(kind):
    problem = Problem(Case())
    given = list(GPU.place(getattr(problem, kind)))
    given[2] = given[2].cpu()
    with pytest.raises(RuntimeError, match="on the device of the equilibria"):
        problem.run(kind, cuda_native, given=tuple(given))
