"""A training epoch as people run it: forward, Jacobian penalty, backward and Adam.

The layer with a linear classifier on top learns five classes of 612 random rows of three modalities
with 500 features, all in one batch, as the BRCA study trains. Every contender starts from the same
weights and the same state of Adam, those after ``BEFORE`` epochs of ours, when equilibria move
little from one epoch to the next; then all take turns, each training its own copy. ``warm`` is ours
with :class:`deqfuse.WarmStart`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import ADJOINT_MAX_ITER, DEVICE, MAX_ITER, Case, Problem, build
from benchmarks.results import Run
from benchmarks.tables import markdown, number, sizes
from benchmarks.timing import Call, Phases, interleave, now, paired_ratio
from benchmarks.variants import BUILDERS, fastest_backend, missing
from deqfuse import Anderson, Implicit, WarmStart

CASE = Case("epoch", 612, 3, 500)
WARM = "warm"
BEFORE, CLASSES, LEARNING_RATE, PENALTY_WEIGHT = 20, 5, 1e-3, 0.1
Forward = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]  # fused output, penalty


@dataclass
class Training:
    """One contender's model, optimiser and last loss."""

    problem: Problem
    head: nn.Linear
    labels: Tensor  # (B,)
    adam: torch.optim.Adam
    loss: float = float("nan")

    @classmethod
    def new(cls, case: Case) -> Training:
        """From the case's weights; labels that can be learnt."""
        problem = build(case)
        for x in problem.features:
            x.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            head = nn.Linear(case.dim, CLASSES).to(DEVICE)
            labels = (problem.features[0] @ torch.randn(case.dim, CLASSES).to(DEVICE)).argmax(1)
        return cls(problem, head, labels, _adam(problem.layer, head))

    def copy(self) -> Training:
        """The same weights and the same state of Adam."""
        twin = replace(
            self,
            problem=replace(self.problem, layer=copy.deepcopy(self.problem.layer)),
            head=copy.deepcopy(self.head),
        )
        twin.adam = _adam(twin.problem.layer, twin.head)
        twin.adam.load_state_dict(copy.deepcopy(self.adam.state_dict()))
        return twin

    def epoch(self, forward: Forward) -> Phases:
        """Seconds of the forward, with the penalty, of the backward and of Adam."""
        device = self.labels.device
        self.adam.zero_grad()
        start = now(device)
        z, penalty = forward(self.problem.features)
        loss = F.cross_entropy(self.head(z), self.labels) + PENALTY_WEIGHT * penalty
        forwards = now(device)
        loss.backward()
        backwards = now(device)
        self.adam.step()
        end = now(device)
        self.loss = float(loss.detach())
        return forwards - start, backwards - forwards, end - backwards


def _adam(layer: nn.Module, head: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=LEARNING_RATE)


def warm_forward(problem: Problem) -> Forward:
    """Ours with last epochs' equilibria as starts, and the tolerances of the others."""
    layer = copy.copy(problem.layer)  # shares the parameters
    layer.solver = Anderson(tol=problem.case.tol, max_iter=MAX_ITER, m=problem.case.m, rescue=False)
    layer.adjoint = Implicit(tol=problem.case.tol, max_iter=ADJOINT_MAX_ITER)
    layer.backend = fastest_backend().removeprefix("deqfuse-")  # type: ignore[assignment]
    warm = WarmStart(layer, problem.case.rows)
    rows = torch.arange(problem.case.rows, device=problem.cotangent.device)

    def forward(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        z, info = warm(features, rows=rows, return_info=True)
        return z, info.jacobian_penalty()

    return forward


def _forward(name: str, problem: Problem) -> Forward:
    if name == WARM:
        return warm_forward(problem)
    penalized = BUILDERS[name](problem, problem.case.tol).penalized
    assert penalized is not None
    return penalized.run


def measure(
    case: Case, budget: float, turns: tuple[int, int]
) -> tuple[dict[str, list[Phases]], dict[str, float]]:
    """Phases of each contender's epochs, in turns, and the loss that it ended with."""
    ours, first = fastest_backend(), Training.new(case)
    forward = _forward(ours, first.problem)
    for _ in range(BEFORE):
        first.epoch(forward)
    names = [ours, WARM, *(n for n in ("torchdeq", "released") if missing(n) is None)]
    trainings = {name: first.copy() for name in names}

    def call_of(name: str) -> Call:
        own = trainings[name]
        forward = _forward(name, own.problem)
        return lambda: own.epoch(forward)

    samples = interleave({name: call_of(name) for name in names}, budget, turns)
    return samples, {name: own.loss for name, own in trainings.items()}


def table(run: Run) -> str:
    """Seconds of an epoch and of its parts; how many times as long as ours, and as the warm one."""
    entries = {e.variant: e for e in run.select("epoch")}
    rows = []
    for e in entries.values():
        parts = [number(1e3 * e.facts["phases"][k]) for k in ("forward", "backward", "adam")]
        ratios: list[Any] = [
            number(paired_ratio(e.samples, entries[name].samples).median)
            if name in entries
            else "-"
            for name in (run.ours, WARM)
        ]
        rows.append([e.variant, sizes(e), number(1e3 * e.time.median), *parts, *ratios])
        rows[-1].append(f"{e.facts['loss']:.4f}")
    header = ["variant", "(B, N, d)", "epoch, ms", "forward", "backward", "Adam"]
    return markdown([*header, "x deqfuse", "x deqfuse warm", "loss at the end"], rows)
