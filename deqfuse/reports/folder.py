"""The report folder: writes only files it may write, all of them or none."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from deqfuse.reports.errors import UserError

__all__ = ["MANIFEST", "OutputFolder", "OutputRefused"]

MANIFEST = ".deqfuse-report.json"


class OutputRefused(UserError):
    """Writing there would touch what deqfuse did not write; the message says what to do."""


class OutputFolder:
    """A folder with a manifest of the files that deqfuse wrote into it, and their checksums.

    Args:
        path: the folder; created when files are written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check(self, names: Sequence[str]) -> None:
        """Refuse early if files of these names could not be written.

        Raises:
            OutputRefused: the path is a file; the folder is not empty and has no manifest; one of
                the files is not in the manifest, or changed since; no permission to write.
        """
        advice = "Choose another folder with --out."
        if not self.path.exists():
            parent = next(p for p in self.path.absolute().parents if p.exists())
            if not parent.is_dir():
                raise OutputRefused(f"{parent} is a file, so {self.path} cannot be made. {advice}")
            if not os.access(parent, os.W_OK):
                raise OutputRefused(f"no permission to write to {parent}. {advice}")
            return
        if not self.path.is_dir():
            raise OutputRefused(f"{self.path} is a file. {advice}")
        if not os.access(self.path, os.W_OK):
            raise OutputRefused(f"no permission to write to {self.path}. {advice}")
        manifest = self._read_manifest()
        if manifest is None:
            if any(self.path.iterdir()):
                raise OutputRefused(
                    f"{self.path} is not empty and was not written by deqfuse. {advice}"
                )
            return
        for name in names:
            file = self.path / name
            if not os.path.lexists(file):
                continue
            if name not in manifest:
                raise OutputRefused(f"{file} was not written by deqfuse. {advice}")
            if not file.is_file() or _checksum(file.read_bytes()) != manifest[name]:
                raise OutputRefused(f"{file} was changed since deqfuse wrote it. {advice}")

    def write(self, files: dict[str, bytes]) -> None:
        """Write the files and the manifest; replace only what :meth:`check` allows.

        Everything goes to temporary names first, so that an interruption or a full disk leaves the
        folder as it was.

        Raises:
            OutputRefused: see :meth:`check`; also when the disk is full or the like.
        """
        self.check([*files])
        created = not self.path.exists()
        manifest = (self._read_manifest() or {}) | {n: _checksum(c) for n, c in files.items()}
        text = json.dumps({"written by": "deqfuse", "files": manifest}, indent=2) + "\n"
        contents = {**files, MANIFEST: text.encode()}
        partial = {name: self.path / f".{name}.{os.getpid()}.partial" for name in contents}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name, content in contents.items():
                partial[name].write_bytes(content)
            with _interrupts_ignored():
                for name, file in partial.items():
                    file.replace(self.path / name)
        except OSError as error:
            raise OutputRefused(f"cannot write the report to {self.path}: {error}") from error
        finally:
            for file in partial.values():
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
            if created:
                with contextlib.suppress(OSError):  # not empty: the files are there
                    self.path.rmdir()

    def _read_manifest(self) -> dict[str, str] | None:
        """File name -> checksum; None where there is no (readable) manifest."""
        try:
            files = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return files if isinstance(files, dict) else None


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A handful of renames must not be cut in two by Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
