"""Saved runs: pytest-benchmark JSON read back, joined, and never mixed across machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import slug
from benchmarks.timing import Spread, spread
from benchmarks.variants import OURS

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Entry:
    """One benchmark: its samples in seconds, in the order of the turns, and its facts."""

    name: str
    samples: list[float]
    facts: dict[str, Any]

    @property
    def variant(self) -> str:
        return str(self.facts["variant"])

    @property
    def time(self) -> Spread:
        return spread(self.samples)


@dataclass(frozen=True)
class Run:
    """What was measured on one machine at one commit."""

    raw: dict[str, Any]
    entries: list[Entry]

    @property
    def slug(self) -> str:
        return slug(self.raw["machine_info"])

    @property
    def machine(self) -> dict[str, Any]:
        own: dict[str, Any] = self.raw["machine_info"]["deqfuse"]
        return own

    @property
    def peak(self) -> float:
        """The best matmul rate of this run, flops per second."""
        return max(self.machine["matmul_rates"].values())

    def select(self, kind: str, **facts: Any) -> list[Entry]:
        """Entries of a kind whose facts are these."""
        return [
            e
            for e in self.entries
            if e.facts["kind"] == kind and all(e.facts.get(k) == v for k, v in facts.items())
        ]

    def by_variant(self, kind: str, case: str, **facts: Any) -> dict[str, Entry]:
        """The variants of one case."""
        found = self.select(kind, **facts)
        return {e.variant: e for e in found if e.facts["case"]["name"] == case}

    def cases(self, kind: str, **facts: Any) -> list[str]:
        """Names of the cases that were measured, in order."""
        return list(dict.fromkeys(e.facts["case"]["name"] for e in self.select(kind, **facts)))

    @property
    def ours(self) -> str:
        """The fastest of our backends that was measured."""
        measured = {e.variant for e in self.entries}
        return next((name for name in OURS if name in measured), OURS[-1])


def load(paths: Sequence[Path]) -> Run:
    """Read saved runs as one.

    Raises:
        ValueError: they are not from the same machine, versions and commit, or measured the same
            group: samples of one variant are paired with another's of the same run only.
    """
    raws = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    for path, raw in zip(paths, raws, strict=True):
        if "deqfuse" not in raw["machine_info"]:
            raise ValueError(
                f"{path}: expected a run of this suite, got other pytest-benchmark JSON. Remedy: "
                "python -m pytest benchmarks --benchmark-json=..."
            )
    for path, raw in zip(paths[1:], raws[1:], strict=True):
        for what, one, other in zip(
            ("machine", "versions", "commit"), _identity(raws[0]), _identity(raw), strict=True
        ):
            if one != other:
                raise ValueError(
                    f"{path}: {what} {other} is not the {one} of {paths[0]}: runs of different "
                    f"{what} are not mixed. Remedy: report them one by one, or --compare them"
                )
    seen: dict[str, Path] = {}
    for path, raw in zip(paths, raws, strict=True):
        groups = {b["group"] for b in raw["benchmarks"]}
        if twice := sorted(groups & seen.keys()):
            raise ValueError(
                f"{path}: expected groups that no other run has, got {twice[0]!r}, which "
                f"{seen[twice[0]]} has too: its samples are not from the same turns. Remedy: "
                "report one of the runs, or measure disjoint cases"
            )
        seen |= dict.fromkeys(groups, path)
    joined = dict(raws[0])
    joined["benchmarks"] = [b for raw in raws for b in raw["benchmarks"]]
    joined["refused"] = [refusal for raw in raws for refusal in raw.get("refused", [])]
    entries = [Entry(b["name"], b["stats"]["data"], b["extra_info"]) for b in joined["benchmarks"]]
    return Run(joined, entries)


def _identity(raw: dict[str, Any]) -> tuple[Any, Any, Any]:
    # The slug does not say which kernels ran: a virtual machine may hide instructions.
    own = raw["machine_info"]["deqfuse"]
    return (
        (slug(raw["machine_info"]), own["instruction_set"]),
        own["versions"],
        raw["commit_info"]["id"],
    )


def save(run: Run, folder: Path) -> None:
    """Still pytest-benchmark JSON, without the white space."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(run.raw, separators=(",", ":"))
    (folder / "run.json").write_text(text + "\n", encoding="utf-8")
