"""Finished trials on disk: one JSON line each, so that an interrupted study can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not on every system; without it two runs in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

from deqfuse.experiments.study import Record, Study
from deqfuse.reports.errors import UserError

__all__ = ["TRIALS", "TrialStore"]

TRIALS = "trials.jsonl"
_WHEN = ("run", "elapsed")


class TrialStore:
    """The file ``trials.jsonl`` of a study's folder.

    Its first line holds the study's settings; every run adds a line that says when, where and by
    which version it was made, and a line per finished trial. A line that a kill cut off is dropped;
    its trial runs again. From the first call to :meth:`close` the file is locked.

    Args:
        folder: the study's output folder; made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / TRIALS
        self.runs: list[Mapping[str, Any]] = []  # what the runs say of themselves, in order
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> TrialStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the file."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def load(self, study: Study) -> dict[str, Record]:
        """Key -> record of the trials that are done; nothing if there is no file.

        Raises:
            UserError: the file belongs to another study, or to other settings of this one; it is
                no such file; another process is writing it.
        """
        if not self.path.exists():
            return {}
        self._acquire()
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            parsed = [json.loads(line.decode("utf-8")) for line in whole]
            if parsed:
                self._check(parsed[0], study)
            self.runs = [line["run"] for line in parsed[1:] if "key" not in line]
            records = [
                Record(r["key"], r["params"], r["seconds"], r["values"], *map(r.get, _WHEN))
                for r in parsed[1:]
                if "key" in r
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: expected the trials of `deqfuse experiment {study.name}`, one JSON "
                f"object per line, got something else ({error}). Remedy: another folder with --out."
            ) from None
        if len(whole) < len(lines):
            self.path.write_bytes(b"".join(whole))
        return {record.key: record for record in records}

    def begin(self, study: Study, run: Mapping[str, Any]) -> int:
        """Write the first line, where there is none, and the line of this run; its number."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._acquire()
        if not self.path.stat().st_size:
            self._write({"study": study.name, "settings": _plain(study.settings())})
        self._write({"run": dict(run)})
        self.runs.append(run)
        return len(self.runs) - 1

    def append(self, record: Record) -> None:
        """Add a finished trial; it survives whatever happens next."""
        self._write(
            {
                "key": record.key,
                "params": dict(record.params),
                "seconds": round(record.seconds, 3),
                "values": dict(record.values),
                "run": record.run,
                "elapsed": record.elapsed,
            }
        )

    def _acquire(self) -> None:
        if self._lock is not None:
            return
        file = self.path.open("ab")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"{self.path}: another process is running this study. Remedy: wait for it, or "
                "another folder with --out."
            ) from None
        self._lock = file

    def _write(self, line: dict[str, Any]) -> None:
        # NaN is no JSON: values without a meaning are None.
        text = json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _check(self, head: dict[str, Any], study: Study) -> None:
        if head["study"] != study.name:
            raise UserError(
                f"{self.path} holds the study {head['study']!r}, not {study.name!r}. "
                "Remedy: another folder with --out."
            )
        before, now = head["settings"], _plain(study.settings())
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{self.path} was begun with {name} = {before.get(name)!r}, this command has "
                    f"{now.get(name)!r}. Remedy: the same options, or another folder with --out."
                )


def _plain(settings: dict[str, Any]) -> Any:
    """As it comes back from the file: tuples become lists."""
    return json.loads(json.dumps(settings))
