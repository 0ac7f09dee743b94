"""Evaluations to a tolerance, per solver and initialisation, and the residual after k steps.

The paper's claim that the fusion converges within a few solver steps, as our own measurement: rows
and layers are drawn as in benchmarks/convergence_study.py, which has the full tables.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks.convergence_study import Case, draw_inputs, measure_seeds
from deqfuse import Anderson, Broyden, DEQFusion, NewtonKrylov, Picard

BASE = Case(dim=64, num_modalities=3)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
SOLVERS = {
    "Picard": Picard(max_iter=100),
    "Anderson": Anderson(max_iter=100, rescue=False),
    "Broyden": Broyden(max_iter=100),
    "NewtonKrylov": NewtonKrylov(max_iter=200),
}
TRACE_STEPS = 20


@pytest.mark.parametrize("init", ["contractive", "torch"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_to_tolerance(solver: str, init: str, full: bool, record: Any) -> None:
    seeds = range(4 if full else 1)
    rows: list[dict[str, float]] = []
    seconds = []
    for tol in TOLERANCES:
        option = dataclasses.replace(SOLVERS[solver], tol=tol)
        case = dataclasses.replace(BASE, solver=option, init=init)
        tally = measure_seeds(case, seeds)
        seconds.append(tally.seconds)
        nfe = tally.nfe.double()
        rows.append(
            {
                "tol": tol,
                "share": tally.share,
                "cells": float(nfe[:-1].mean()),
                "fuse": float(nfe[-1].mean()),
                "most": float(nfe.max()),
            }
        )
    record(
        seconds,
        group=f"convergence {init}",
        kind="convergence",
        variant=solver,
        init=init,
        table=rows,
    )
    if solver == "Anderson" and init == "contractive":
        assert all(row["share"] == 1 for row in rows)


@pytest.mark.parametrize("init", ["contractive", "torch"])
@pytest.mark.parametrize("solver", ["Picard", "Anderson"])
def test_residual_per_step(solver: str, init: str, record: Any) -> None:
    """Median and 95th percentile of the residual of the fuse block after each step."""
    torch.manual_seed(0)
    option = dataclasses.replace(SOLVERS[solver], tol=1e-30, max_iter=TRACE_STEPS, trace=True)
    layer = DEQFusion(
        64,
        3,
        init=init,
        injection_norm=False,
        solver=option,
        on_failure="ignore",  # type: ignore[arg-type]
    )
    with torch.no_grad():
        _, info = layer(draw_inputs(BASE), return_info=True)
    trace = info.fuse.trace.double().nan_to_num(nan=float("inf"))
    # The residual of the best iterate so far: what a caller who stopped there would have.
    best = trace.cummin(0).values
    record(
        [1.0],
        group=f"residuals {init}",
        kind="residuals",
        variant=solver,
        init=init,
        median=best.median(1).values.tolist(),
        high=best.quantile(0.95, dim=1).tolist(),
    )
