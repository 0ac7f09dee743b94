"""Finished trials on disk: one JSON line each, so that an interrupted study can go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from deqfuse.cli.errors import UserError
from deqfuse.experiments.study import Record, Study

__all__ = ["TRIALS", "TrialStore"]

TRIALS = "trials.jsonl"


class TrialStore:
    """The file ``trials.jsonl`` of a study's folder.

    Its first line holds the study's settings, every other line a finished trial. A line that a
    kill cut off is dropped; its trial runs again.

    Args:
        folder: the study's output folder; made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / TRIALS

    def load(self, study: Study) -> dict[str, Record]:
        """Key -> record of the trials that are done; nothing if there is no file.

        Raises:
            UserError: the file belongs to another study, or to other settings of this one.
        """
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            self.path.write_text("".join(whole), encoding="utf-8")
        if not whole:
            self.path.unlink()
            return {}
        try:
            head, *rest = (json.loads(line) for line in whole)
            self._check(head, study)
            records = [Record(r["key"], r["params"], r["seconds"], r["values"]) for r in rest]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: expected the trials of `deqfuse experiment {study.name}`, one JSON "
                f"object per line, got something else ({error}). Remedy: another folder with --out."
            ) from None
        return {record.key: record for record in records}

    def begin(self, study: Study) -> None:
        """Write the first line, where there is none."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"study": study.name, "settings": _plain(study.settings())})

    def append(self, record: Record) -> None:
        """Add a finished trial; it survives whatever happens next."""
        self._write(
            {
                "key": record.key,
                "params": dict(record.params),
                "seconds": round(record.seconds, 3),
                "values": dict(record.values),
            }
        )

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
