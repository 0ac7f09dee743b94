"""What a study is: trials that depend on nothing but their parameters, and a report of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deqfuse.reports.page import Report

__all__ = ["Record", "Study", "Trial", "select"]

Json = Any  # numbers, strings, None, lists and dicts of them


@dataclass(frozen=True)
class Trial:
    """One training or measurement.

    Args:
        key: its name, unique in the study; a finished trial is found again by it.
        params: what the study needs to run it, seeds included.
        alone: runs after all others and with nothing beside it, because it measures time.
    """

    key: str
    params: Mapping[str, Json]
    alone: bool = False


@dataclass(frozen=True)
class Record:
    """A finished trial."""

    key: str
    params: Mapping[str, Json]
    seconds: float
    values: Mapping[str, Json]
    run: int | None = None  # number of the run that made it, from 0; None: not recorded
    elapsed: float | None = None  # seconds since that run began


class Study(ABC):
    """An experiment. Pickled into worker processes, so it holds options and paths, not data."""

    name: str

    @abstractmethod
    def settings(self) -> dict[str, Json]:
        """What the results depend on besides the trials: a resumed run must have the same."""

    @abstractmethod
    def trials(self) -> list[Trial]:
        """All trials, in the order in which they are run."""

    @abstractmethod
    def run(self, trial: Trial) -> dict[str, Json]:
        """Run one trial: the same values every time, times apart."""

    @abstractmethod
    def report(self, records: Sequence[Record]) -> Report:
        """The report of all trials, in the order of :meth:`trials`."""

    @abstractmethod
    def files(self) -> list[str]:
        """Names of the report's pictures, known before anything is run."""


def select(records: Sequence[Record], **params: Json) -> list[Record]:
    """The records with these parameters, in order."""
    return [r for r in records if all(r.params.get(k) == v for k, v in params.items())]
