"""The CUDA adjoint on the emulator: its answers, other schedules, a barrier less.

Run by test_ptxsim.py in a process of its own; needs nvcc.
"""

from __future__ import annotations

import re

import pytest
import torch
from adjoints import Emulated, lib, playing, take, texts
from cpu_cases import Case
from cuda_cases import (
    CUTS,
    H100,
    Problem,
    device,
    distance,
    limit_for,
    own_and_common_numbers,
)
from emulator import SEED, faults, reports

from deqfuse import Outcome
from deqfuse.backends import cpu_native, cuda_native

CASES = {
    "resident": Case(rows=9, dim=32, groups=4, n=2, dtype="f32", variant="released-mmimdb"),
    "streamed": Case(rows=9, dim=50, groups=2, n=1, dtype="f32"),
    "steps": Case(rows=17, dim=50, groups=2, n=1, dtype="f32", variant="released"),
}
KINDS = ("cells", "fuse")
each_cut = pytest.mark.parametrize("cut", CUTS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def run(problem: Problem, kind: str, cut: str, seed: int = SEED, **options):
    """As ``problem.run``; findings are faults of the test."""
    playing(limit_for(cut, problem.case), seed)
    found = problem.run(kind, Emulated, **options)
    wrong = faults(reports())
    assert not wrong, "\n".join(wrong[:5])
    # All results are written. Not so the sums' last number, which only keeps them from being empty,
    # nor, in the scratch memory of steps, what belongs to rows that are not there.
    left = [entry for entry in lib.emu_unwritten().decode().split("; ") if entry]
    fine = re.compile(r"allocation \d+ \[\d+\]x(?:([48]): \1 of \d+|1: \d+ of \d{4,}) bytes")
    assert not [entry for entry in left if not fine.fullmatch(entry)]
    return found


def check(case: Case, cut: str, kind: str, **options: bool) -> None:
    """As exact as the host policy, in as many applications of J^T.

    By rounding, a row whose checked residual is near the tolerance may go one round more: the
    direction's application, the residual's, and the check's (common/bicgstab.h).
    """
    problem = Problem(case, mask=True)
    truth, _ = problem.run(kind, cpu_native, dtype=torch.float64, tol=1e-13)
    with device(limit_for(cut, case)):
        host, (_, nfe, _) = problem.run(kind, cuda_native, **options)
    given, (residual, ours, outcome) = run(problem, kind, cut, **options)
    assert (outcome == Outcome.CONVERGED).all()
    assert (residual <= options.get("tol", problem.tol)).all()
    assert (ours - nfe).abs().max() <= 3
    unit = torch.finfo(torch.float64 if case.dtype == "f64" else torch.float32).eps
    assert distance(given, truth) <= 4 * distance(host, truth) + 64 * unit


@each_kind
@each_cut
def test_answers_and_no_findings(cut: str, kind: str) -> None:
    check(CASES[cut], cut, kind)


@each_cut
def test_rows_may_have_numbers_of_modalities_of_their_own(cut: str) -> None:
    case = CASES[cut]
    playing(limit_for(cut, case), SEED)
    given, expected = own_and_common_numbers(case, Emulated)
    assert not faults(reports())
    assert distance(given, expected) <= 64 * torch.finfo(torch.float32).eps


@each_kind
@each_cut
def test_no_schedule_changes_a_bit(cut: str, kind: str) -> None:
    problem = Problem(CASES[cut], mask=True)
    runs = [list(run(problem, kind, cut, seed=SEED + k)[0].values()) for k in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


BARRIER = re.compile(r"\tbar\.(?:warp\.)?sync\s+[^;]*;|\tbarrier\.sync[^;]*;")


@each_kind
def test_a_barrier_less_is_noticed(kind: str) -> None:
    """One after the other is removed from the kernel of whole solves until one is missed."""
    problem = Problem(CASES["resident"], mask=True)
    tile = {"cells": "CellTile", "fuse": "FuseTile"}[kind]
    (name,) = (n for n in texts if "whole" in n and tile in n and "EfLi16ELb1E" in n)
    text = texts[name]
    begin = text.index(f".visible .entry {name}(")
    end = text.find(".visible .entry", begin + 1)
    places = [m.span() for m in BARRIER.finditer(text, begin, end if end > 0 else len(text))]
    assert places
    playing(H100, SEED)
    try:
        for a, b in places[:: max(1, len(places) // 8)]:
            take(name, text[:a] + text[b:])
            problem.run(kind, Emulated)
            if faults(reports()):
                return
        pytest.fail(f"none of {len(places)} barriers was missed")
    finally:
        take(name, text)
        reports()


SLOW = [
    ("resident", Case(rows=5, dim=50, groups=2, n=1, dtype="f32", variant="released-mmimdb"), {}),
    ("resident", Case(rows=9, dim=20, groups=5, n=2, dtype="f64"), {}),
    ("streamed", Case(rows=5, dim=66, groups=33, n=1, dtype="f32", variant="released"), {}),
    ("streamed", Case(rows=9, dim=50, groups=2, n=1, dtype="f64", variant="released-mmimdb"), {}),
    ("steps", Case(rows=37, dim=93, groups=31, n=1, dtype="f32", variant="released-mmimdb"), {}),
    ("steps", Case(rows=17, dim=50, groups=2, n=1, dtype="f64", variant="released"), {}),
    ("steps", Case(rows=17, dim=300, groups=4, n=1, dtype="f32"), {}),
    ("streamed", Case(rows=17, dim=200, groups=4, n=1, dtype="f32", variant="released"), {}),
]


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize(("cut", "case", "options"), SLOW, ids=str)
def test_awkward_and_wide_ones(cut: str, case: Case, options: dict, kind: str) -> None:
    check(case, cut, kind, **options)


@pytest.mark.slow
@each_kind
@each_cut
@pytest.mark.parametrize(
    "options", [{"history": 0, "max_iter": 12}, {"mode": 3}, {"max_iter": 5}, {"want": False}],
    ids=str,
)  # fmt: skip
def test_other_solvers_and_budgets_are_those_of_the_host_policy(cut, kind, options) -> None:
    problem = Problem(CASES[cut], mask=True)
    with device(limit_for(cut, problem.case)):
        host, (_, nfe, outcome) = problem.run(kind, cuda_native, **options)
    given, (_, ours, ended) = run(problem, kind, cut, **options)
    assert (ours - nfe).abs().max() <= 3
    assert torch.equal(ended, outcome)
    assert distance(given, host) <= 1e-4
