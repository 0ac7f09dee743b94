"""A training epoch, one benchmark per contender."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from benchmarks import epoch
from benchmarks.variants import OURS, fastest_backend, missing

_measured: list[Any] = []


@pytest.mark.parametrize("variant", [*OURS, epoch.WARM, "torchdeq", "released"])
def test_epoch(variant: str, full: bool, record: Any) -> None:
    if variant in OURS and variant != fastest_backend():
        pytest.skip("only the backend that auto takes")
    if variant in ("torchdeq", "released") and missing(variant):
        pytest.skip(f"{variant}: {missing(variant)}")
    if not _measured:
        _measured.append(epoch.measure(epoch.CASE, 40.0 if full else 15.0, (5, 20)))
    samples, losses = _measured[0]
    own = samples[variant]
    phases = map(statistics.median, zip(*own, strict=True))
    record(
        [sum(sample) for sample in own],
        group="epoch",
        kind="epoch",
        variant=variant,
        case={
            "name": epoch.CASE.name,
            "rows": epoch.CASE.rows,
            "modalities": epoch.CASE.modalities,
            "dim": epoch.CASE.dim,
        },
        phases=dict(zip(("forward", "backward", "adam"), phases, strict=True)),
        loss=losses[variant],
    )
