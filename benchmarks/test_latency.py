"""Latency of few rows, one benchmark per variant, case and number of threads."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import cases, latency
from benchmarks.variants import OURS, fastest_backend, missing

VARIANTS = (*OURS, latency.PREPARED, "torchdeq", "compiled", latency.CHAIN)
_measured: dict[tuple[str, int], Any] = {}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threads", latency.THREADS)
@pytest.mark.parametrize("name", latency.CASES)
def test_latency(name: str, threads: int, variant: str, full: bool, record: Any) -> None:
    if cases.DEVICE != "cpu" and threads != 1:
        pytest.skip("threads are the CPU's")
    if not full and name not in latency.QUICK:
        pytest.skip("measured with --full (make bench-full)")
    if variant in OURS and variant != fastest_backend():
        pytest.skip("only the backend that auto takes")
    if not full and variant == "compiled":
        pytest.skip("compiled for long; measured with --full (make bench-full)")
    if variant in ("torchdeq", "compiled") and missing(variant):
        pytest.skip(f"{variant}: {missing(variant)}")
    case, key = latency.CASES[name], (name, threads)
    if key not in _measured:
        _measured.clear()  # the samples of one case only
        _measured[key] = latency.measure(case, threads, 2.0 if full else 0.5, full)
    samples, facts = _measured[key]
    own = samples[variant]
    record(
        own,
        group=f"latency {name} threads={threads}",
        kind="latency",
        variant=variant,
        threads=threads,
        case={"name": name, "rows": case.rows, "modalities": case.modalities, "dim": case.dim},
        p99=latency.quantile(own, 0.99),
        **facts,
    )
