"""Where the numbers of a report come from: which runs made its trials, and how long they took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deqfuse.experiments.study import Record

__all__ = ["run_facts"]


def run_facts(
    records: Sequence[Record],
    runs: Sequence[Mapping[str, Any]],
    rendered: Mapping[str, str],
) -> dict[str, str]:
    """What somebody needs to know to repeat or to doubt the numbers.

    Args:
        records: all trials of the report.
        runs: what each run said of itself.
        rendered: the same of the call that writes the page.
    """
    facts: dict[str, str] = {}
    for number, run in enumerate(runs):
        mine = [r for r in records if r.run == number]
        if not mine:
            continue
        known = [r.elapsed for r in mine if r.elapsed is not None]
        wall = f"{max(known):.0f} s" if known else "not recorded"
        at = f"run {number + 1}, " if len(runs) > 1 else ""
        facts |= {
            f"{at}{name}": str(value)
            for name, value in run.items()
            if name not in ("jobs", "threads")
        }
        facts[f"{at}trials"] = (
            f"{len(mine)} trials with {run['jobs']} x {run['threads']} (processes x threads "
            f"of torch), wall time {wall}, {sum(r.seconds for r in mine):.0f} s of work"
        )
    unknown = [r for r in records if r.run is None]
    if unknown:
        seconds = sum(r.seconds for r in unknown)
        facts["trials of runs that are not recorded"] = (
            f"{len(unknown)} trials, {seconds:.0f} s of work; date, versions and wall time "
            "were not kept"
        )
    return {**facts, "page written": f"{rendered['date']}, deqfuse {rendered['deqfuse']}"}
