"""The benchmark suite itself: the gate refuses what is wrong, and samples are paired in turns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from benchmarks import floor, timing
from benchmarks.arena import EQUAL_ERROR, TOLERANCES, Arena, Refused, Setting, loosest
from benchmarks.cases import CASES, MAX_ITER, Case, Problem, build
from benchmarks.gate import Truth, find_truth, judge, reference_share
from benchmarks.plain import flat_map
from benchmarks.released import joint_anderson
from benchmarks.test_overhead import count
from benchmarks.test_scaling import slope
from benchmarks.variants import BUILDERS, Answer, Contender, deqfuse_variant, missing
from deqfuse import Implicit, OneStep
from deqfuse.backends.maps import PAPER
from deqfuse.backends.reference import adjoint_cells, adjoint_fuse
from deqfuse.testing import naive_injections, naive_map

CASE = Case("tiny", 8, 2, 32)
RUNNABLE = [name for name in BUILDERS if missing(name) is None and name != "compiled"]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return build(CASE)


@pytest.fixture(scope="module")
def truth(problem: Problem) -> Truth:
    return find_truth(problem)


def reference(problem: Problem, tol: float = CASE.tol) -> Contender:
    return deqfuse_variant("reference")(problem, tol)


def one_step(problem: Problem, tol: float) -> Contender:
    """The right answer, differentiated without the linear solve."""
    right = reference(problem, tol)
    layer = copy.copy(right.fused)
    layer.adjoint = OneStep()
    return dataclasses.replace(right, fused=layer)


@pytest.mark.parametrize("name", RUNNABLE)
def test_gate_lets_right_variants_pass(name: str, problem: Problem, truth: Truth) -> None:
    contender = BUILDERS[name](problem, CASE.tol)
    verdict = judge(problem, contender, truth)
    assert verdict.reason is None
    answer = contender.answer(problem.features)
    assert answer.nfe_cells.shape in ((CASE.modalities, CASE.rows), ())
    assert answer.nfe_fuse.shape in ((CASE.rows,), ())
    assert verdict.solved == 1
    assert verdict.gradient_error is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore::DeprecationWarning")
def test_gate_lets_the_compiled_reference_pass(problem: Problem, truth: Truth) -> None:
    contender = BUILDERS["compiled"](problem, CASE.tol)
    assert judge(problem, contender, truth).reason is None
    assert contender.answer(problem.features).nfe_cells.shape == (CASE.modalities, CASE.rows)


def test_gate_refuses_a_wrong_answer(problem: Problem, truth: Truth) -> None:
    right = reference(problem)
    wrong = dataclasses.replace(right, fused=lambda features: 1.001 * right.fused(features))
    reason = judge(problem, wrong, truth).reason
    assert reason is not None
    assert reason.startswith("residual")


def test_gate_refuses_the_fixed_point_of_another_problem(problem: Problem, truth: Truth) -> None:
    """A solve of the right equations with the wrong input is converged by its own account."""
    right = reference(problem)

    def swap(run: Callable[[Sequence[Tensor]], Answer]) -> Callable[[Sequence[Tensor]], Answer]:
        return lambda features: run(features[::-1])

    wrong = Contender("swapped", swap(right.fused), swap(right.answer))  # type: ignore[arg-type]
    assert judge(problem, wrong, truth).reason is not None


def test_gate_refuses_a_variant_that_stops_early(problem: Problem, truth: Truth) -> None:
    verdict = judge(problem, reference(problem, tol=0.1), truth)
    assert verdict.reason is not None
    assert verdict.reason.startswith("residual")
    assert verdict.solved < 1


def test_gate_refuses_nan(problem: Problem, truth: Truth) -> None:
    right = reference(problem)
    wrong = dataclasses.replace(right, fused=lambda features: right.fused(features) * torch.nan)
    assert judge(problem, wrong, truth).reason is not None


def test_gate_refuses_the_gradient_of_one_step(problem: Problem, truth: Truth) -> None:
    verdict = judge(problem, one_step(problem, CASE.tol), truth)
    assert verdict.reason is not None
    assert verdict.reason.startswith("gradient")


def test_gate_refuses_a_wrong_gradient_of_one_small_leaf(problem: Problem, truth: Truth) -> None:
    """Half of the gradient of one bias is lost, which nobody sees in the whole."""
    right = reference(problem)
    bias = problem.layer.cells[0].linear1.bias

    def lossy(features: Sequence[Tensor]) -> Tensor:
        handle = bias.register_hook(lambda grad: 0.5 * grad)
        z = right.fused(features)
        handles.append(handle)
        return z

    handles: list[RemovableHandle] = []
    verdict = judge(problem, dataclasses.replace(right, fused=lossy), truth)
    for handle in handles:
        handle.remove()
    assert verdict.reason is not None
    assert "gradient of cells.0.linear1.bias" in verdict.reason


def test_gate_refuses_a_step_with_another_forward_value(problem: Problem, truth: Truth) -> None:
    """Right without gradients, right gradients, and a wrong value in the training step."""
    right = reference(problem)

    def shifted(features: Sequence[Tensor]) -> Tensor:
        z = right.fused(features)
        return z + 0.1 if z.requires_grad else z

    reason = judge(problem, dataclasses.replace(right, fused=shifted), truth).reason
    assert reason is not None
    assert reason.startswith("step: error")


def test_equal_error_takes_the_loosest_tolerance_that_is_near_enough(
    problem: Problem, truth: Truth
) -> None:
    setting = Setting(problem, truth, 1.0)
    _, verdict, tol = loosest(setting, "deqfuse-reference", "step")
    assert verdict.reason is None
    assert verdict.error is not None
    assert verdict.error <= EQUAL_ERROR.fused
    looser = TOLERANCES[TOLERANCES.index(tol) - 1]
    assert judge(problem, reference(problem, looser), truth, EQUAL_ERROR).reason is not None


def test_equal_error_forgives_no_wrong_gradient(
    problem: Problem, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILDERS, "one-step", one_step)
    setting = Setting(problem, truth, 1.0)
    assert loosest(setting, "one-step", "forward")[1].reason is None
    reason = loosest(setting, "one-step", "step")[1].reason
    assert reason is not None
    assert reason.startswith("gradient")


def test_gate_catches_early_stopping_where_rows_have_no_equilibrium() -> None:
    problem = build(dataclasses.replace(CASES["small"]).at_torch_init())
    share = reference_share(problem)
    assert 0 < share < 1  # what the regime is about
    assert judge(problem, reference(problem), None, share=share).reason is None
    lazy = judge(problem, reference(problem, tol=0.5), None, share=share)
    assert lazy.reason is not None
    assert lazy.reason.startswith("stopped early")

    def one_row_to_the_end(features: Sequence[Tensor]) -> Answer:
        answer = reference(problem, tol=0.5).answer(features)
        nfe = answer.nfe_fuse.clone()
        nfe[0] = MAX_ITER
        return answer._replace(nfe_fuse=nfe)

    sly = dataclasses.replace(reference(problem, tol=0.5), answer=one_row_to_the_end)
    assert judge(problem, sly, None, share=share).reason is not None
    joint = one_row_to_the_end(problem.features)._replace(nfe_fuse=torch.tensor(MAX_ITER))
    tired = dataclasses.replace(sly, answer=lambda features: joint)
    assert judge(problem, tired, None, share=share).reason is None


def test_every_variant_solves_the_same_weights(problem: Problem) -> None:
    again = build(CASE)
    for name, leaf in again.leaves().items():
        assert torch.equal(leaf, problem.leaves()[name])
    assert build(dataclasses.replace(CASE, seed=1)).cotangent.ne(problem.cotangent).all()


def test_rivals_evaluate_the_equations_of_the_papers() -> None:
    """The plain map is the naive one to rounding, and multiplies what ``joint_flops`` counts."""
    problem = build(Case("plain", 6, 3, 32))
    torch.manual_seed(1)
    state = torch.randn(6, 4, 32)
    f, start = flat_map(problem.layer, problem.features)
    with torch.no_grad():
        x, x_fuse = naive_injections(problem.layer, problem.features)
        expected = naive_map(problem.layer, state, x, x_fuse)
        with FlopCounterMode(display=False) as counter:
            found = f(state.flatten(1))
    assert start.shape == (6, 4 * 32)
    assert not start.any()
    torch.testing.assert_close(found.unflatten(1, (4, 32)), expected, rtol=1e-5, atol=1e-5)
    assert counter.get_total_flops() == floor.joint_flops(problem.case, 1)


@pytest.mark.parametrize("name", ["released", "torchdeq"])
def test_rivals_run_nothing_of_deqfuse(name: str, problem: Problem) -> None:
    """No operator of ours is dispatched in a rival's training step."""
    if missing(name):
        pytest.skip(str(missing(name)))
    contender = BUILDERS[name](problem, CASE.tol)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        contender.fused(problem.features).sum().backward()
    names = {event.name for event in profiler.events() or []}
    assert "aten::native_group_norm" in names
    assert not {n for n in names if n.startswith("deqfuse::")}


@pytest.mark.parametrize("name", ["released", "torchdeq"])
def test_evaluations_of_a_joint_solver_are_counted(name: str, problem: Problem) -> None:
    if missing(name):
        pytest.skip(str(missing(name)))
    few, many = (BUILDERS[name](problem, tol).answer(problem.features) for tol in (1e-1, 1e-5))
    assert 1 < int(few.nfe_fuse) < int(many.nfe_fuse) <= MAX_ITER


def test_released_anderson_on_a_known_fixed_point() -> None:
    torch.manual_seed(0)
    a = torch.randn(12, 12, dtype=torch.float64)
    a = 0.8 * a / torch.linalg.matrix_norm(a, 2)
    b = torch.randn(3, 12, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - a, b.T).T
    z, nfe = joint_anderson(lambda z: z @ a.T + b, torch.zeros_like(b), 1e-6, 200)
    assert float((z - exact).norm() / exact.norm()) < 1e-5
    fixed, steps = joint_anderson(lambda z: z @ a.T + b, torch.zeros_like(b), None, nfe)
    assert steps == nfe
    assert torch.allclose(fixed, z)


# ---- arena ---------------------------------------------------------------------------------------


def test_arena_refuses_an_injected_variant_and_times_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a builder to results: what is wrong has a reason, no samples, and no other use."""

    def wrong(problem: Problem, tol: float) -> Contender:
        right = reference(problem, tol)
        return dataclasses.replace(right, fused=lambda features: 1.01 * right.fused(features))

    for name in [name for name in BUILDERS if name not in ("deqfuse-reference", "released")]:
        monkeypatch.delitem(BUILDERS, name)
    monkeypatch.setitem(BUILDERS, "wrong", wrong)
    arena = Arena(budget=0.0, turns=(2, 2))
    for regime, quantity in (
        ("tolerance", "forward"),
        ("tolerance", "step"),
        ("equal-error", "forward"),
    ):
        results = arena.results(CASE, regime, quantity)
        assert set(results) == {"deqfuse-reference", "released", "wrong"}
        assert results["wrong"].verdict.reason is not None
        assert {name: len(result.samples) for name, result in results.items()} == {
            "deqfuse-reference": 2, "released": 2, "wrong": 0,
        }  # fmt: skip
        assert results["deqfuse-reference"].facts["flops"]["forward"] > 0
    assert arena.entrant(CASE, "released")[1].name == "released"
    with pytest.raises(Refused, match="residual"):
        arena.entrant(CASE, "wrong")
    assert set(arena.accuracy(CASE)) == {"deqfuse-reference", "released"}


# ---- time ----------------------------------------------------------------------------------------


def taking(seconds: float, log: list[str], name: str) -> timing.Call:
    """Says that it took so long, on a busy machine too."""

    def call() -> timing.Phases:
        log.append(name)
        return (seconds,)

    return call


def test_variants_take_turns() -> None:
    log: list[str] = []
    calls = {name: taking(0.006, log, name) for name in "abc"}
    samples = timing.interleave(calls, budget=0.0, turns=(6, 6))
    turns = log[6:]  # after two warm-up calls of each
    assert [sorted(turns[i : i + 3]) for i in range(0, len(turns), 3)] == [["a", "b", "c"]] * 6
    assert len({tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)}) > 1  # order changes
    assert {name: len(taken) for name, taken in samples.items()} == dict.fromkeys("abc", 6)


def test_short_calls_are_repeated_within_a_visit() -> None:
    log: list[str] = []
    samples = timing.interleave({"a": taking(0.0005, log, "a")}, budget=0.0, turns=(5, 5))
    assert len(samples["a"]) == 5
    assert len(log) >= 2 + 5 * 3
    assert all(0.0005 <= seconds < 0.005 for (seconds,) in samples["a"])


def test_ratios_pair_samples_of_a_turn() -> None:
    """Ratios 2, 2, 4, 4, 30 within the turns; of the medians 20, of sorted samples 2 to 20."""
    fast, slow = [1.0, 10.0, 1.0, 10.0, 1.0], [2.0, 20.0, 4.0, 40.0, 30.0]
    assert timing.paired_ratio(slow, fast) == (4.0, 2.0, 4.0)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        timing.paired_ratio(slow, fast[:-1])


def test_spread_is_median_and_quartiles() -> None:
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0, 4.0)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0)


def test_operators_and_reads_are_counted() -> None:
    x = torch.ones(())
    found = count(lambda: x.add(x).relu())  # relu contains another operator
    assert (found["operators"], found["scalar_reads"]) == (2, 0)
    assert count(lambda: x.add(x).item())["scalar_reads"] == 1


def test_slope_is_that_of_the_last_sizes() -> None:
    """Quadratic with a fixed cost that hides it at the first sizes."""
    sizes = [1, 2, 64, 128, 256]
    assert slope(sizes, [50.0 + s**2 for s in sizes]) == pytest.approx(2, abs=0.02)


# ---- floor ---------------------------------------------------------------------------------------


def test_forward_floor_counts_the_products_that_are_made() -> None:
    """Two rows, one cell: evaluations 4 and 2 of the cell, 3 and 1 of the fuse map."""
    case = Case("counted", 2, 1, 10, num_groups=2)
    zero = torch.zeros(0)
    answer = Answer(zero, zero, torch.tensor([[4, 2]]), torch.tensor([3, 1]))
    products = 2 * ((4 - 1) + (2 - 1) + (3 - 1) + (1 - 1)) + 2  # and the gate's constant per row
    assert floor.forward_flops(case, answer) == products * 2 * case.dim**2
    assert floor.joint_flops(case, 5) == 5 * 2 * (2 + 1 + 1) * 2 * case.dim**2


def test_backward_floor_is_below_what_the_reference_multiplies(problem: Problem) -> None:
    """Counted by torch in the reference's own backward, which also orthogonalises."""
    layer = problem.layer
    with torch.no_grad():
        answer = reference(problem).answer(problem.features)
        x = torch.stack(problem.features)
        x_fuse = x.sum(0)  # the weights of the modalities are one at initialisation
        flat = [t for cell in layer.cells for t in cell.flat()]
        common = (CASE.num_groups, PAPER, Implicit(tol=CASE.tol), True)
        with FlopCounterMode(display=False) as counter:
            fuse = layer.combine.flat()
            _, d_sum, _, _ = adjoint_fuse(
                problem.cotangent, answer.z, x_fuse, answer.cells.sum(0), fuse, None, 2, *common
            )
            d_cells = d_sum.expand_as(answer.cells).contiguous()
            adjoint_cells(d_cells, answer.cells, x, flat, *common)
    total = counter.get_total_flops()
    assert 0.7 * total < floor.backward_flops(problem, answer, CASE.tol) <= total
