"""The cuda backend's solves on a GPU: answers, batches, launches, streams, graphs.

Not run on one yet. Under TRITON_INTERPRET=1 they are rehearsed on the CPU; see gpu_cases.
"""

from __future__ import annotations

import pytest
import torch
from gpu_cases import (
    CELLS,
    DEVICE,
    LARGE,
    MARK,
    NAMES,
    PATHS,
    REHEARSAL,
    REPEATS,
    ROWS,
    STEPPED,
    WHOLE,
    WIDTHS,
    anderson,
    captured,
    in_float64,
    layer_of,
    needs_memory,
    no_synchronisation,
    on_device,
    profiled,
    rehearsal,  # noqa: F401 - a fixture
    solves,
    streams,
    synchronize,
    tf32,  # noqa: F401 - a fixture
)

from deqfuse import Anderson, DEQFusion, Outcome
from deqfuse.backends import cuda, reference

pytestmark = MARK


def assert_at_the_equilibria(given_solves, exact_solves, tol, error):
    """All rows converge, and lie within ``error`` of float64's answers."""
    for solve, exact in zip(given_solves, exact_solves, strict=True):
        given = solve(anderson(tol=tol))
        truth = exact.func(*map(in_float64, exact.args), Anderson(tol=1e-11, max_iter=200))
        assert (given.outcome == Outcome.CONVERGED).all()
        assert (given.residual <= tol).all()
        distance = (given.z - truth.z).norm(dim=-1) / truth.z.norm(dim=-1)
        assert (distance <= error).all()


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(("dim", "groups"), WIDTHS)
def test_answers_are_the_equilibria(dim, groups, dtype):
    exacts = solves(dim, groups, dtype=dtype, backend=reference)
    given = solves(dim, groups, dtype=dtype)
    assert_at_the_equilibria(given, exacts, tol=1e-5, error=4e-5)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(("dim", "groups"), WIDTHS)
def test_answers_with_tf32_products(dim, groups):
    """They converge to the default tolerance; docs/explanation/kernels-gpu.md emulates how far."""
    exacts = solves(dim, groups, backend=reference)
    assert_at_the_equilibria(solves(dim, groups), exacts, tol=1e-4, error=1e-3)


@PATHS
@pytest.mark.parametrize("arithmetic", ["ieee", "tf32"])
def test_batches_and_repeats_change_no_bit(dim, groups, arithmetic, request):
    if arithmetic == "tf32":
        request.getfixturevalue("tf32")
    rows = 18 if REHEARSAL else 1000
    middle = rows // 2
    for solve in solves(dim, groups, rows=rows):
        together = solve(anderson())
        for _ in range(REPEATS):
            for mine, again in zip(together, solve(anderson()), strict=True):
                assert torch.equal(mine, again)
        for part in (slice(0, 1), slice(middle, middle + 3), slice(rows - 1, rows)):
            pick = [
                t[..., part, :] if isinstance(t, torch.Tensor) and t.shape[-2] == rows else t
                for t in solve.args
            ]
            alone = solve.func(*pick, anderson())
            assert torch.equal(alone.z, together.z[..., part, :])
            assert torch.equal(alone.nfe, together.nfe[..., part])


@PATHS
def test_a_solve_never_synchronises(dim, groups):
    for solve in solves(dim, groups):
        solve(anderson())  # compiles
        synchronize()
        with no_synchronisation():
            for _ in range(1 if REHEARSAL else 3):  # capture, replay, replay
                solve(anderson())


@PATHS
def test_a_default_layer_never_synchronises(dim, groups):
    layer = layer_of(dim, groups, CELLS, torch.float32).requires_grad_(True)
    x = list(torch.randn(CELLS, ROWS, dim).to(DEVICE))
    for _ in range(3):  # compiles, and pins memory for the reports
        layer(x)
    with no_synchronisation():
        for _ in range(3):
            layer(x)


@on_device
@pytest.mark.parametrize(("on_failure", "copies"), [("ignore", 0), ("warn", 2)])
def test_a_forward_is_two_launches_and_two_for_packing(on_failure, copies):
    dim, groups = WHOLE
    layer = DEQFusion(dim, 3, num_groups=groups, on_failure=on_failure).requires_grad_(False)
    layer, x = layer.to(DEVICE), list(torch.randn(3, ROWS, dim).to(DEVICE))
    layer(x)  # compiles
    synchronize()
    layer(x)  # reports what the first left, and has pinned memory from now on
    synchronize()
    done, calls = profiled(lambda: layer(x))
    assert sum("Memcpy DtoH" in name for name in done) == copies, done
    kernels = [name for name in done if "Memcpy" not in name]
    assert len(kernels) == 4, kernels
    assert sum("_solve_cells_kernel" in name for name in kernels) == 1, kernels
    assert sum("_solve_fuse_kernel" in name for name in kernels) == 1, kernels
    assert sum("Launch" in name for name in calls) == 4, calls
    assert not [name for name in calls if "Synchronize" in name], calls


@on_device
def test_a_stepped_solve_is_one_graph():
    for solve in solves(*STEPPED):
        for _ in range(3):  # steps, capture, replay
            solve(anderson())
        synchronize()
        done, calls = profiled(lambda solve=solve: solve(anderson()))
        assert sum("GraphLaunch" in name for name in calls) == 1, calls
        assert not [name for name in calls if "Synchronize" in name], calls
        # All steps are launched, whether any row is left or not.
        steps = sum("_anderson_step_kernel" in name for name in done)
        assert steps == anderson().max_iter, done


@PATHS
def test_a_layer_under_a_graph_of_the_callers(dim, groups):
    """Its report would ask an event whether it has happened, which no capture survives."""
    layer = layer_of(dim, groups, CELLS, torch.float32)
    x = list(torch.randn(CELLS, ROWS, dim).to(DEVICE))
    expected = layer(x)  # leaves a report to be asked for
    given, replay = captured(lambda: layer(x))
    given.fill_(torch.nan)
    replay()
    assert torch.equal(given, expected)


@PATHS
def test_under_a_graph_of_the_callers(dim, groups):
    for solve in solves(dim, groups):
        expected = solve(anderson())
        given, replay = captured(lambda solve=solve: solve(anderson()))
        given.z.fill_(torch.nan)
        replay()
        assert torch.equal(given.z, expected.z)
        assert torch.equal(given.nfe, expected.nfe)


@PATHS
def test_two_streams(dim, groups):
    problems = [solves(dim, groups, seed=seed)[0] for seed in (0, 1)]
    expected = [problem(anderson()).z for problem in problems]
    enter = streams(len(problems))
    synchronize()
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(min(REPEATS, 20)):
        for problem, stream, into in zip(problems, enter, found, strict=True):
            with stream():
                into.append(problem(anderson()).z)
    synchronize()
    for answers, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(z, wanted) for z in answers)


@pytest.mark.skipif(not REHEARSAL and torch.cuda.device_count() < 2, reason="needs two GPUs")
@PATHS
def test_a_device_that_is_not_the_current_one(dim, groups):
    device = DEVICE if REHEARSAL else torch.device("cuda:1")

    def moved(value):
        if isinstance(value, list):
            return [moved(v) for v in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    for solve in solves(dim, groups):
        other = solve.func(*map(moved, solve.args), anderson())
        assert other.z.device == device
        assert torch.equal(other.z.cpu(), solve(anderson()).z.cpu())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@PATHS
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_poisoned_row_stays_alone(dim, groups, value):
    for solve in solves(dim, groups):
        healthy = solve(anderson())
        solve.args[0][..., 5, 7] = value
        given = solve(anderson())
        assert (given.outcome[..., 5] == Outcome.NON_FINITE).all()
        others = [row for row in range(ROWS) if row != 5]
        assert torch.equal(given.z[..., others, :], healthy.z[..., others, :])
        assert torch.equal(given.nfe[..., others], healthy.nfe[..., others])


@on_device
@PATHS
def test_memory_is_what_the_operands_and_the_history_take(dim, groups):
    rows, n = 2048, 3
    layer = DEQFusion(dim, n, num_groups=groups).requires_grad_(False).to(DEVICE)
    x = list(torch.randn(n, rows, dim).to(DEVICE))
    for _ in range(4):  # compiles and steps, capture, replay
        layer(x)
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    z = layer(x)
    plane = z.numel() * 4
    states, packed = (n + 1) * plane, 4 * sum(p.numel() for p in layer.parameters())
    # Whole solves: features stacked, states, answer, sum; steps besides: answers twice, sums.
    most = (2 * n + 4) * plane if (dim, groups) == WHOLE else 4 * states
    assert torch.cuda.max_memory_allocated() - before <= most + packed + (1 << 20)


@LARGE
def test_a_whole_solves_offsets_beyond_31_bits():
    """Over 2^31 numbers in features and answers, taken by the last rows; takes about 20 GB."""
    needs_memory(30)
    dim, groups = WHOLE
    rows, tail = 70 if REHEARSAL else 2_150_400_000 // dim, slice(-40, None)
    assert cuda.one_launch(torch.empty(0, dim, device=DEVICE), groups, anderson())
    cells, fuse = solves(dim, groups, rows=40, n=1)
    x = torch.randn(1, 1, dim).to(DEVICE).expand(1, rows, dim).contiguous()
    x[:, tail] = cells.args[0]
    few, many = cells(anderson()), cells.func(x, *cells.args[1:], anderson())
    assert torch.equal(many.z[:, tail], few.z)
    assert torch.equal(many.nfe[:, tail], few.nfe)
    del many
    rest = (fuse.args[2], None, *fuse.args[4:], anderson())
    many = fuse.func(x[0], x[0], *rest)  # the features as the cells' sum: two tensors fewer
    assert torch.equal(many.z[tail], fuse.func(x[0, tail], x[0, tail], *rest).z)
