"""The cuda backend on a GPU: answers, batches, launches, streams, graphs. Not run on one yet."""

from __future__ import annotations

import functools

import pytest
import torch

from deqfuse import Anderson, DEQFusion, Outcome
from deqfuse.backends import cuda, reference

pytestmark = pytest.mark.gpu

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
WIDTHS = ((50, 2), (64, 4), (128, 4), (256, 4), (300, 4), (512, 4), (1000, 4), (1024, 4))


def solves(dim=128, groups=4, rows=77, n=3, dtype="f32", backend=cuda, seed=0):
    """Both solves of a layer with random norms, as functions of the solver."""
    torch.manual_seed(seed)
    layer = DEQFusion(dim, n, num_groups=groups).requires_grad_(False)
    for part in layer.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.weight.uniform_(0.6, 1.4)
            part.bias.uniform_(-0.3, 0.3)
    layer = layer.to("cuda", DTYPES[dtype])
    x = torch.randn(n, rows, dim).to("cuda", DTYPES[dtype])
    cell_sum = torch.randn(rows, dim).to("cuda", reference.compute_dtype(DTYPES[dtype]))
    mask = (2.0 * (torch.rand(rows, dim) > 0.5)).to(x)
    flat = [t for part in layer.cells for t in part.flat()]
    parameters = layer.combine.flat()
    rest = (groups, "paper")
    return [
        functools.partial(backend.solve_cells, x, flat, None, *rest),
        functools.partial(
            backend.solve_fuse, x.sum(0), cell_sum, parameters, mask, None, n, *rest
        ),
    ]  # fmt: skip


def in_float64(value):
    if isinstance(value, list):
        return [in_float64(v) for v in value]
    return value.double() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "groups"), WIDTHS)
def test_answers_are_the_equilibria(dim, groups, dtype):
    """The true residual of each answer, in float64, is what it says, up to float32's rounding."""
    solver = Anderson(tol=1e-5)
    exacts = solves(dim, groups, dtype=dtype, backend=reference)
    for solve, exact in zip(solves(dim, groups, dtype=dtype), exacts, strict=True):
        given = solve(solver)
        truth = exact.func(*map(in_float64, exact.args), Anderson(tol=1e-11, max_iter=200))
        assert (given.outcome == Outcome.CONVERGED).all()
        error = (given.z - truth.z).norm(dim=-1) / truth.z.norm(dim=-1)
        assert (error <= 4 * solver.tol).all()


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(("dim", "groups"), WIDTHS)
def test_answers_with_tf32_products(dim, groups):
    """They converge to the default tolerance; docs/kernels-gpu.md emulates how far they get."""
    exacts = solves(dim, groups, backend=reference)
    for solve, exact in zip(solves(dim, groups), exacts, strict=True):
        given = solve(Anderson(tol=1e-4))
        truth = exact.func(*map(in_float64, exact.args), Anderson(tol=1e-11, max_iter=200))
        assert (given.outcome == Outcome.CONVERGED).all()
        error = (given.z - truth.z).norm(dim=-1) / truth.z.norm(dim=-1)
        assert (error <= 1e-3).all()


@pytest.mark.parametrize(("dim", "groups"), [(128, 4), (300, 4)], ids=["whole", "stepped"])
def test_memory_is_what_the_operands_and_the_history_take(dim, groups):
    rows, n = 2048, 3
    layer = DEQFusion(dim, n, num_groups=groups).requires_grad_(False).cuda()
    x = list(torch.randn(n, rows, dim).cuda())
    layer(x)  # compiles
    for _ in range(3):  # steps, capture, replay
        layer(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    z = layer(x)
    plane = z.numel() * 4
    states, packed = (n + 1) * plane, 4 * sum(p.numel() for p in layer.parameters())
    # Whole solves: features stacked, states, answer, sum; steps besides: answers twice, sums.
    most = (2 * n + 4) * plane if dim <= 128 else 4 * states
    assert torch.cuda.max_memory_allocated() - before <= most + packed + (1 << 20)


@pytest.mark.parametrize(("dim", "groups"), [(128, 4), (300, 4)], ids=["whole", "stepped"])
@pytest.mark.parametrize("arithmetic", ["ieee", "tf32"])
def test_batches_and_repeats_change_no_bit(dim, groups, arithmetic, request):
    if arithmetic == "tf32":
        request.getfixturevalue("tf32")
    for solve in solves(dim, groups, rows=1000):
        together = solve(Anderson())
        for _ in range(100):
            assert torch.equal(solve(Anderson()).z, together.z)
        for part in (slice(0, 1), slice(500, 517), slice(999, 1000)):
            pick = [
                t[..., part, :] if isinstance(t, torch.Tensor) and t.shape[-2] == 1000 else t
                for t in solve.args
            ]
            assert torch.equal(solve.func(*pick, Anderson()).z, together.z[..., part, :])


@pytest.mark.parametrize(("dim", "groups"), [(128, 4), (300, 4)], ids=["whole", "stepped"])
def test_a_solve_never_synchronises(dim, groups):
    for solve in solves(dim, groups):
        solve(Anderson())  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):  # steps, capture, replay
                solve(Anderson())
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("on_failure", "copies"), [("ignore", 0), ("warn", 2)])
def test_a_forward_is_two_launches_and_two_for_packing(on_failure, copies):
    layer = DEQFusion(128, 3, on_failure=on_failure).requires_grad_(False).cuda()
    x = list(torch.randn(3, 77, 128).cuda())
    layer(x)  # compiles
    torch.cuda.synchronize()
    layer(x)  # reports what the first left, and has pinned memory from now on
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        layer(x)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert sum("Memcpy DtoH" in name for name in names) == copies, names
    kernels = [name for name in names if "Memcpy" not in name]
    assert len(kernels) == 4, kernels
    assert sum("solve" in name for name in kernels) == 2


@pytest.mark.parametrize("dim", [128, 300], ids=["whole", "stepped"])
def test_a_default_layer_never_synchronises(dim):
    layer, x = DEQFusion(dim, 3).cuda(), list(torch.randn(3, 77, dim).cuda())
    for _ in range(3):  # compiles, and pins memory for the reports
        layer(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dim", [128, 300], ids=["whole", "stepped"])
def test_a_layer_under_a_graph_of_the_callers(dim):
    """Its report would ask an event whether it has happened, which no capture survives."""
    layer, x = DEQFusion(dim, 3).requires_grad_(False).cuda(), torch.randn(3, 77, dim).cuda()
    expected = layer(list(x))  # leaves a report to be asked for
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = layer(list(x))
    given.fill_(torch.nan)
    graph.replay()
    assert torch.equal(given, expected)


@pytest.mark.parametrize(("dim", "groups"), [(128, 4), (300, 4)], ids=["whole", "stepped"])
def test_under_a_graph_of_the_callers(dim, groups):
    for solve in solves(dim, groups):
        expected = solve(Anderson())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            given = solve(Anderson())
        given.z.fill_(torch.nan)
        graph.replay()
        assert torch.equal(given.z, expected.z)
        assert torch.equal(given.nfe, expected.nfe)


@pytest.mark.parametrize(("dim", "groups"), [(128, 4), (300, 4)], ids=["whole", "stepped"])
def test_two_streams(dim, groups):
    problems = [solves(dim, groups, seed=seed)[0] for seed in (0, 1)]
    expected = [problem(Anderson()).z for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for problem, stream, into in zip(problems, streams, found, strict=True):
            with torch.cuda.stream(stream):
                into.append(problem(Anderson()).z)
    torch.cuda.synchronize()
    for answers, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(z, wanted) for z in answers)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("dim", "groups"), [(128, 4), (300, 4)], ids=["whole", "stepped"])
def test_a_device_that_is_not_the_current_one(dim, groups):
    def moved(value):
        if isinstance(value, list):
            return [moved(v) for v in value]
        return value.to("cuda:1") if isinstance(value, torch.Tensor) else value

    for solve in solves(dim, groups):
        other = solve.func(*map(moved, solve.args), Anderson())
        assert other.z.device.index == 1
        assert torch.equal(other.z.cpu(), solve(Anderson()).z.cpu())


@pytest.mark.parametrize("dtype", ["f32", "f64"], ids=["whole", "stepped"])
def test_a_poisoned_row_stays_alone(dtype):
    for solve in solves(dtype=dtype):
        healthy = solve(Anderson())
        solve.args[0][..., 5, 7] = torch.nan
        given = solve(Anderson())
        assert (given.outcome[..., 5] == Outcome.NON_FINITE).all()
        others = [row for row in range(77) if row != 5]
        assert torch.equal(given.z[..., others, :], healthy.z[..., others, :])


@pytest.mark.slow
def test_offsets_beyond_31_bits():
    """Over 2^31 numbers: the last row is computed where it lies. Takes about 40 GB."""
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs a GPU with 60 GB")
    from deqfuse.triton_kernels import cell

    dim, rows = 1024, 2_100_000
    torch.manual_seed(0)
    layer = DEQFusion(dim, 1).requires_grad_(False).cuda()
    packed = cell.pack_cells(layer.cells[0].flat())
    z = torch.randn(1, rows, dim, device="cuda")
    out = cell.residual_cell(z, z, packed, 4, False, hidden=torch.empty_like(z))
    tail = z[:, -40:]
    assert torch.equal(cell.residual_cell(tail, tail, packed, 4, False), out[:, -40:])
