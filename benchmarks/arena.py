"""Where variants meet: one problem, the gate, then turns until the budget is spent.

``results`` measures all variants of a case the first time that one of them is asked for, so that
the tests can be one per variant while the measurement is interleaved.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from benchmarks import floor
from benchmarks.cases import Case, Problem, build
from benchmarks.gate import Limits, Truth, Verdict, find_truth, judge, reference_share, row_error
from benchmarks.penalty import judge_penalty
from benchmarks.timing import MAKERS, Phases, forward_call, interleave, spread
from benchmarks.variants import BUILDERS, OURS, Contender, available, fastest_backend

# "tolerance": every row at the case's tol. "equal-error": each variant at the loosest tolerance at
# which its answer is within 1e-5 of the float64 equilibrium. "torch-init": torch's default
# initialisation, where rows may have none within reach and everybody has the same budget; forward
# only, since without an equilibrium there is no gradient to check.
REGIMES = ("tolerance", "equal-error", "torch-init")
# Measured in the same turns, since the share of the penalty compares them.
TOGETHER = ("step", "penalty")
INF = float("inf")
EQUAL_ERROR = Limits(residual=INF, block=INF, fused=1e-5, gradient=1e-4)
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)


class Refused(Exception):
    """The gate found a variant wrong; the text is its reason."""


@dataclass(frozen=True)
class Result:
    """Samples of one variant, or why there are none."""

    samples: list[Phases]
    verdict: Verdict
    tol: float
    facts: dict[str, Any]


class Point(NamedTuple):
    """One solve: the tolerance it was given, the worst row's true error, the median time."""

    tol: float
    error: float
    seconds: float


@dataclass
class Setting:
    """What the quantities of a case share."""

    problem: Problem
    truth: Truth | None
    share: float
    entrants: dict[str, tuple[Contender, Verdict, float]] = field(default_factory=dict)


class Arena:
    """Results by case, regime and quantity; keeps the weights of the latest case only."""

    def __init__(self, budget: float, turns: tuple[int, int]) -> None:
        self.budget, self.turns = budget, turns
        self._results: dict[tuple[str, str, str], dict[str, Result]] = {}
        self._accuracy: dict[str, dict[str, list[Point]]] = {}
        self._setting: tuple[tuple[str, str, str], Setting] | None = None

    def results(self, case: Case, regime: str, quantity: str) -> dict[str, Result]:
        """Of every variant that can run here; refused ones have a reason and no samples."""
        key = (case.name, regime, quantity)
        if key not in self._results:
            together = regime == "tolerance" and quantity in TOGETHER
            found = self._measure(case, regime, TOGETHER if together else (quantity,))
            self._results |= {(case.name, regime, each): own for each, own in found.items()}
        return self._results[key]

    def entrant(self, case: Case, variant: str, quantity: str = "") -> tuple[Problem, Contender]:
        """A variant that passed the gate at the case's tolerance, to do something else with.

        Args:
            quantity: "penalty" for one whose penalty passed as well.

        Raises:
            Refused: it did not pass.
        """
        setting = self._enter(case, "tolerance", "")
        contender, verdict, _ = setting.entrants[variant]
        if quantity == "penalty" and verdict.reason is None:
            verdict = _verdict_with_penalty(setting, variant)
        if verdict.reason is not None:
            raise Refused(verdict.reason)
        return setting.problem, contender

    def accuracy(self, case: Case) -> dict[str, list[Point]]:
        """Error and time at every tolerance, in turns, of the variants that passed the gate."""
        if case.name in self._accuracy:
            return self._accuracy[case.name]
        setting = self._enter(case, "tolerance", "")
        problem, truth = setting.problem, setting.truth
        assert truth is not None
        right = [name for name, (_, verdict, _) in setting.entrants.items() if not verdict.reason]
        calls, errors = {}, {}
        for name in right:
            for tol in TOLERANCES[2:]:
                contender = BUILDERS[name](problem, tol)
                with torch.no_grad():
                    errors[f"{name} {tol}"] = row_error(contender.fused(problem.features), truth.z)
                calls[f"{name} {tol}"] = forward_call(problem, contender)
        samples = interleave(calls, 2 * self.budget, self.turns)
        found: dict[str, list[Point]] = {name: [] for name in right}
        for key, taken in samples.items():
            name, given = key.split()
            seconds = spread([sum(sample) for sample in taken]).median
            found[name].append(Point(float(given), errors[key], seconds))
        self._accuracy[case.name] = found
        return found

    def _measure(
        self, case: Case, regime: str, quantities: tuple[str, ...]
    ) -> dict[str, dict[str, Result]]:
        """By quantity and variant, all in the same turns."""
        setting = self._enter(case, regime, quantities[0])
        verdicts = {quantity: _verdicts(setting, quantity) for quantity in quantities}
        calls = {
            f"{quantity} {name}": MAKERS[quantity](setting.problem, setting.entrants[name][0])
            for quantity, own in verdicts.items()
            for name, verdict in own.items()
            if verdict.reason is None
        }
        samples = interleave(calls, len(quantities) * self.budget, self.turns, seed=case.seed)
        found: dict[str, dict[str, Result]] = {quantity: {} for quantity in quantities}
        for quantity, own in verdicts.items():
            for name, verdict in own.items():
                taken = samples.get(f"{quantity} {name}", [])
                facts = _facts(setting, name, regime, quantity) if taken else {}
                if taken and quantity == "penalty":
                    facts["without"] = [sum(sample) for sample in samples[f"step {name}"]]
                found[quantity][name] = Result(taken, verdict, setting.entrants[name][2], facts)
        return found

    def _enter(self, case: Case, regime: str, quantity: str) -> Setting:
        """Build the problem and send every variant through the gate."""
        # At equal error forward and step may need different tolerances.
        key = (case.name, regime, quantity if regime == "equal-error" else "")
        if self._setting is not None and self._setting[0] == key:
            return self._setting[1]
        self._setting = None  # frees the last case's weights first
        problem = build(case.at_torch_init() if regime == "torch-init" else case)
        if regime == "torch-init":
            setting = Setting(problem, None, reference_share(problem))
        else:
            setting = Setting(problem, find_truth(problem), 1.0)
        for name in available():
            if regime == "equal-error":
                setting.entrants[name] = loosest(setting, name, quantity)
            else:
                contender = BUILDERS[name](problem, case.tol)
                verdict = judge(problem, contender, setting.truth, share=setting.share)
                setting.entrants[name] = contender, verdict, case.tol
        self._setting = (key, setting)
        return setting


def _verdicts(setting: Setting, quantity: str) -> dict[str, Verdict]:
    """Of the variants that have this quantity, and of those that the gate refused."""
    found = {}
    for name, (contender, verdict, _) in setting.entrants.items():
        if verdict.reason is None and quantity == "penalty" and contender.penalized is not None:
            found[name] = _verdict_with_penalty(setting, name)
        elif (
            verdict.reason is not None
            or quantity == "forward"
            or (quantity == "step" and contender.differentiable)
        ):
            found[name] = verdict
    return found


def _verdict_with_penalty(setting: Setting, name: str) -> Verdict:
    contender, verdict, _ = setting.entrants[name]
    assert setting.truth is not None
    return judge_penalty(setting.problem, contender, setting.truth, verdict)


def _facts(setting: Setting, name: str, regime: str, quantity: str) -> dict[str, Any]:
    """Work counts and rates, where they mean something."""
    problem, case = setting.problem, setting.problem.case
    contender, verdict, tol = setting.entrants[name]
    facts: dict[str, Any] = {"case": dataclasses.asdict(case)}
    if name in OURS:
        with torch.no_grad():
            answer = contender.answer(problem.features)
        facts["flops"] = {"forward": floor.forward_flops(case, answer)}
        if quantity != "forward":
            facts["flops"]["backward"] = floor.backward_flops(problem, answer, tol)
        if quantity == "penalty":
            facts["flops"]["penalty"] = floor.penalty_flops(case)
        facts["bytes"] = floor.least_bytes(case)
    if regime == "tolerance" and quantity == "forward":
        if name == fastest_backend():
            facts["kernel_rate"] = floor.kernel_rate(case, budget=0.2)
        elif name == "torchdeq":
            facts["flops"] = {"forward": floor.joint_flops(case, verdict.nfe_fuse)}
            facts["linear_rate"] = floor.linear_rate(case.rows, case.dim, budget=0.2)
    return facts


def loosest(setting: Setting, name: str, quantity: str) -> tuple[Contender, Verdict, float]:
    """A variant at the loosest tolerance whose answer, and gradient in a step, are near enough.

    Whether the residual met that tolerance does not matter here: the error does.
    """
    for tol in TOLERANCES:
        contender = BUILDERS[name](setting.problem, tol)
        if quantity == "forward":
            contender = dataclasses.replace(contender, differentiable=False)
        verdict = judge(setting.problem, contender, setting.truth, EQUAL_ERROR)
        if verdict.reason is None:
            break
    return contender, verdict, tol
