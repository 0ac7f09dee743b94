"""The training step with penalty: its gate, its floor, its turns, and the tables about it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floor, memory, omics_step, plots, report, tables
from benchmarks.arena import Arena, Refused
from benchmarks.cases import Case, Problem, build
from benchmarks.gate import Truth, Verdict, find_truth, judge
from benchmarks.penalty import expected, judge_penalty
from benchmarks.plain import flat_map
from benchmarks.results import Run, load
from benchmarks.variants import BUILDERS, Contender, Penalized, deqfuse_variant, missing
from deqfuse import Anderson
from deqfuse.backends.penalty import draw_probes
from deqfuse.diagnostics import jacobian_penalty

CASE = Case("tiny", 8, 2, 32)
RUNNABLE = [name for name in BUILDERS if missing(name) is None and name != "compiled"]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return build(CASE)


@pytest.fixture(scope="module")
def truth(problem: Problem) -> Truth:
    return find_truth(problem)


def reference(problem: Problem) -> Contender:
    return deqfuse_variant("reference")(problem, CASE.tol)


def verdict_of(problem: Problem, truth: Truth, contender: Contender) -> Verdict:
    return judge_penalty(problem, contender, truth, judge(problem, contender, truth))


def changed(
    contender: Contender, change: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
) -> Contender:
    """The same with another result of its step with penalty."""
    own = contender.penalized
    assert own is not None
    wrong = Penalized(lambda features: change(own.run(features)), own.probes)
    return dataclasses.replace(contender, penalized=wrong)


@pytest.mark.parametrize("name", RUNNABLE)
def test_gate_lets_right_penalties_pass(name: str, problem: Problem, truth: Truth) -> None:
    verdict = verdict_of(problem, truth, BUILDERS[name](problem, CASE.tol))
    assert verdict.reason is None
    assert verdict.penalty_error is not None
    assert verdict.penalty_gradient_error is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore::DeprecationWarning")
def test_gate_lets_the_compiled_penalty_pass(problem: Problem, truth: Truth) -> None:
    assert verdict_of(problem, truth, BUILDERS["compiled"](problem, CASE.tol)).reason is None


@pytest.mark.parametrize("name", [n for n in RUNNABLE if n != "cuda-graph"])
def test_gradient_of_the_whole_loss_is_that_of_its_parts(name: str, problem: Problem) -> None:
    """One backward pass through both outputs, as it is timed, solves for the output's part only."""
    contender = BUILDERS[name](problem, CASE.tol)
    assert contender.penalized is not None
    leaves = list(problem.leaves().values())

    def gradients(*outputs: int) -> list[Tensor]:
        torch.manual_seed(3)
        assert contender.penalized is not None
        found = contender.penalized.run(problem.features)
        cotangents = (problem.cotangent, torch.tensor(20.0))
        return list(
            torch.autograd.grad(
                [found[i] for i in outputs], leaves, [cotangents[i] for i in outputs],
                allow_unused=True, materialize_grads=True,
            )
        )  # fmt: skip

    for both, one, other in zip(gradients(0, 1), gradients(0), gradients(1), strict=True):
        torch.testing.assert_close(both, one + other, rtol=1e-4, atol=1e-5)


def test_gate_refuses_another_value(problem: Problem, truth: Truth) -> None:
    wrong = changed(reference(problem), lambda out: (out[0], 1.01 * out[1]))
    assert str(verdict_of(problem, truth, wrong).reason).startswith("penalty off by")


@pytest.mark.parametrize(("lost", "reason"), [(0.2, "above 0.05"), (0.03, "as a whole")])
def test_gate_refuses_a_wrong_gradient(
    lost: float, reason: str, problem: Problem, truth: Truth
) -> None:
    """The value is right; part of the gradient is lost, more or less than a leaf's may be off."""
    wrong = changed(
        reference(problem), lambda out: (out[0], (1 - lost) * out[1] + lost * out[1].detach())
    )
    found = str(verdict_of(problem, truth, wrong).reason)
    assert found.startswith("penalty: gradient")
    assert reason in found


def test_gate_refuses_another_output_beside_the_right_penalty(
    problem: Problem, truth: Truth
) -> None:
    wrong = changed(reference(problem), lambda out: (out[0] + 0.1, out[1]))
    assert "output off by" in str(verdict_of(problem, truth, wrong).reason)
    wrong = changed(reference(problem), lambda out: (out[0] + out[0] - out[0].detach(), out[1]))
    assert "gradient of the output" in str(verdict_of(problem, truth, wrong).reason)


def test_gate_refuses_the_joint_jacobian(problem: Problem, truth: Truth) -> None:
    """The norm of the whole Jacobian has the fuse equation's dependence on the cells in it."""
    layer = problem.layer

    def run(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        f, _ = flat_map(layer, features)
        state = torch.cat([*truth.cells, truth.z], dim=1).float().requires_grad_()
        image = f(state)
        probe = torch.randn_like(state)
        (pulled,) = torch.autograd.grad(image, state, probe, create_graph=True)
        return image[:, -CASE.dim :], pulled.square().sum() / state.numel()

    def probes() -> Tensor:
        return torch.randn(CASE.rows, 3 * CASE.dim).unflatten(1, (3, -1)).transpose(0, 1)

    wrong = dataclasses.replace(reference(problem), penalized=Penalized(run, probes))
    assert str(verdict_of(problem, truth, wrong).reason).startswith("penalty off by")


def test_gate_refuses_probes_of_another_law(problem: Problem, truth: Truth) -> None:
    right = reference(problem)
    assert right.penalized is not None
    loud = Penalized(right.penalized.run, lambda: 1.2 * torch.randn(3, CASE.rows, CASE.dim))
    reason = verdict_of(problem, truth, dataclasses.replace(right, penalized=loud)).reason
    assert "Gaussian" in str(reason)


def test_truth_is_that_of_the_generic_estimate(problem: Problem, truth: Truth) -> None:
    """Of the library's measurement on any map, in float64, with the same probes."""
    twin = problem.double()
    layer = copy.copy(twin.layer)
    layer.backend, layer.solver = "reference", Anderson(tol=1e-11, max_iter=500)
    _, info = layer(twin.features, return_info=True)
    assert info.blocks is not None
    torch.manual_seed(5)
    other = jacobian_penalty([block()[:2] for block in info.blocks], 1)
    torch.manual_seed(5)
    value, gradients = expected(
        problem, truth, draw_probes(torch.empty(3, CASE.rows, CASE.dim, dtype=torch.float64), 1)[0]
    )
    assert value == pytest.approx(float(other.detach()), rel=1e-8)
    weight = layer.cells[0].linear2.weight
    (grad,) = torch.autograd.grad(other, weight)
    torch.testing.assert_close(gradients["cells.0.linear2.weight"], grad, rtol=1e-7, atol=1e-12)


def test_floor_counts_what_the_reference_multiplies(problem: Problem) -> None:
    """Its evaluation of the fuse map makes one product more: the gate's constant by itself."""
    _, info = reference(problem).fused(problem.features, return_info=True)  # type: ignore[call-arg]
    with FlopCounterMode(display=False) as counter:
        info.jacobian_penalty()
    constant = 2 * CASE.rows * CASE.dim**2
    assert counter.get_total_flops() - constant == floor.penalty_flops(CASE)


def test_arena_times_both_steps_in_the_same_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a wrong penalty is timed without it."""

    def wrong(problem: Problem, tol: float) -> Contender:
        return changed(reference(problem), lambda out: (out[0], 2 * out[1]))

    for name in [name for name in BUILDERS if name not in ("deqfuse-reference", "released")]:
        monkeypatch.delitem(BUILDERS, name)
    monkeypatch.setitem(BUILDERS, "wrong", wrong)
    arena = Arena(budget=0.0, turns=(2, 2))
    penalty = arena.results(CASE, "tolerance", "penalty")
    step = arena.results(CASE, "tolerance", "step")
    assert str(penalty["wrong"].verdict.reason).startswith("penalty off by")
    assert [len(step[n].samples) for n in ("deqfuse-reference", "released", "wrong")] == [2, 2, 2]
    assert [len(penalty[n].samples) for n in ("deqfuse-reference", "released", "wrong")] == [
        2,
        2,
        0,
    ]
    for name in ("deqfuse-reference", "released"):
        taken = [sum(sample) for sample in step[name].samples]
        assert penalty[name].facts["without"] == taken
    flops = penalty["deqfuse-reference"].facts["flops"]
    assert set(flops) == {"forward", "backward", "penalty"}
    assert "penalty" not in step["deqfuse-reference"].facts["flops"]
    assert arena.entrant(CASE, "wrong")[1].name == "deqfuse-reference"
    with pytest.raises(Refused, match="penalty off by"):
        arena.entrant(CASE, "wrong", "penalty")


@pytest.mark.skipif(not memory.STATUS.exists(), reason="memory on the CPU is measured on Linux")
def test_memory_of_a_step_with_penalty_is_measured() -> None:
    assert memory.measure("small", "deqfuse-reference", "penalty", "cpu", 1)["extra"] > 0


def test_omics_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omics_step, "ROWS", 8)
    monkeypatch.setattr(omics_step, "DIM", 16)
    table = omics_step.measure(steps=1, budget=0.0, turns=(1, 1))
    assert "| DEQ Fusion with penalty | 1 |" in table
    assert len(table.splitlines()) == 2 + 4


# ---- tables --------------------------------------------------------------------------------------

MACHINE = {
    "machine": "x86_64",
    "cpu": {"brand_raw": "Some CPU"},
    "deqfuse": {
        "threads": 2,
        "gpu": None,
        "versions": {"deqfuse": "0.1.0", "torch": "2.13.0"},
        "instruction_set": "avx512",
        "compiler": "c++ 12",
        "matmul_rates": {"F.linear": 1e11},
        "bandwidth": 1e10,
    },
}
# Seconds of the step without and with the penalty.
STEPS = {"deqfuse-cpu": (0.03, 0.04), "torchdeq": (0.12, 0.152)}


def entry(case: str, dim: int, quantity: str, variant: str) -> dict[str, Any]:
    without, penalized = STEPS[variant]
    seconds = {"forward": 0.01, "step": without, "penalty": penalized}[quantity]
    facts = {
        "kind": "speed", "regime": "tolerance", "quantity": quantity, "variant": variant,
        "case": {"name": case, "rows": 32, "modalities": 3, "dim": dim},
        "nfe_cells": 5.0, "nfe_fuse": 4.0, "bytes": 1e6,
        "flops": {"forward": 1e8, "backward": 3e8, "penalty": 4e8},
    }  # fmt: skip
    if quantity == "penalty":
        facts["without"] = [without * (1 + 0.1 * i) for i in range(3)]
    else:
        del facts["flops"]["penalty"]  # type: ignore[attr-defined]
    name = f"test_speed[tolerance-{case}-{quantity}-{variant}]"
    data = [seconds * (1 + 0.1 * i) for i in range(3)]  # the machine slows down: ratios stay
    return {
        "name": name, "group": name, "stats": {"data": data}, "extra_info": facts,
    }  # fmt: skip


def run_of(path: Path, quantities: Sequence[str], cases: dict[str, int]) -> Run:
    raw = {
        "machine_info": MACHINE,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-01T00:00:00",
        "benchmarks": [
            entry(case, dim, quantity, variant)
            for case, dim in cases.items()
            for quantity in quantities
            for variant in STEPS
        ],
        "refused": [],
    }
    path.write_text(json.dumps(raw))
    return load([path])


def test_cost_of_the_penalty_pairs_what_was_measured_together(tmp_path: Path) -> None:
    """Ours 30 and 40 ms, torchdeq's 120 and 152: share 25%, ratios 4 and 3.8, quotient 0.95."""
    run = run_of(tmp_path / "run.json", ["penalty"], {"medium": 256})
    table = tables.penalty_table(run, ["medium"])
    assert "| 33 (31.5-34.5) | 44 (42-46) | **25%** (25%-25%) |" in table
    assert "| **4** (4-4) | **3.8** (3.8-3.8) | **0.95** (0.95-0.95) |" in table


def test_what_is_asked_of_the_penalty_depends_on_the_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ASKED_OF", ("small_128", "medium"))
    cases = {"small_128": 128, "medium": 256}
    run = run_of(tmp_path / "run.json", ["penalty"], cases)
    assert tables.penalty_missed(run) == []
    monkeypatch.setitem(STEPS, "deqfuse-cpu", (0.03, 0.045))  # share 33%, quotient 0.844
    found = tables.penalty_missed(run_of(tmp_path / "slow.json", ["penalty"], cases))
    assert found == [
        "small_128: quotient 0.844, at least 0.85 is asked.",
        "medium: share 33.3%, at most 30% is asked.",
        "medium: quotient 0.844, at least 0.9 is asked.",
    ]
    found = tables.penalty_missed(run_of(tmp_path / "few.json", ["penalty"], {"medium": 256}))
    assert found[0].startswith("small_128: not measured")


def test_report_prints_the_cost_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "ASKED_OF", ("medium",))
    run_of(tmp_path / "run.json", ["penalty"], {"medium": 256, "mosi_rows": 50})
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "run.json"), "--penalty"])
    assert report.main() == 0
    text = capsys.readouterr().out
    assert "| medium |" in text
    assert "mosi_rows" not in text
    assert text.endswith("Nothing is missed.\n")
    monkeypatch.setattr(tables, "ASKED_OF", ("medium", "wide"))
    assert report.main() == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "run.json"]


def test_readme_has_the_penalty_as_a_third_column(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run.json", ["forward", "step", "penalty"], {"medium": 256})
    header, _, row = report.readme_block(run).splitlines()[1:4]
    assert header == "| samples, modalities, features | forward | step | step with penalty |"
    assert row.endswith("| x 4 (33 ms) | x 3.8 (44 ms) |")


def test_page_shows_the_penalty_where_it_was_measured(tmp_path: Path) -> None:
    quantities = ["forward", "step", "penalty"]
    run = run_of(tmp_path / "run.json", quantities, {"medium": 256})
    run.entries.append(
        dataclasses.replace(
            run.entries[0],
            facts={
                "kind": "penalty-memory", "variant": "deqfuse-cpu", "case": {"name": "brca"},
                "without": 50 * 2**20, "extra": 60 * 2**20,
            },
        )
    )  # fmt: skip
    text = report.page(run, [])
    assert "## Training step with penalty" in text
    assert tables.penalty_table(run, ["medium"]) in text
    assert "| brca | deqfuse-cpu | 50 | 60 | 1.2 |" in text
    assert "| medium | deqfuse-cpu | step with penalty |" in text
    assert len(plots.speedup(run).axes) == 3
    before = run_of(tmp_path / "before.json", quantities[:2], {"medium": 256})
    assert "penalty" not in report.page(before, [])
    assert len(plots.speedup(before).axes) == 2
