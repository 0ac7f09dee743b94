"""Progress for people: live bars on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Stage", "make_console"]

LOG_INTERVAL = 10.0  # seconds between lines when there is no terminal
LOG_WIDTH = 120


def make_console() -> Console:
    """Standard output, texts as they are; wide enough for the table when it goes to a file."""
    # A folder may be called "x[old]" or "a:b:", which rich would read as markup and as an emoji.
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


class Stage:
    """One part of the work with a known number of steps, as a context manager.

    Args:
        console: where to write.
        title: shown in front of the bar.
        total: number of :meth:`advance` calls to come.
    """

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._done = 0
        self._last_line = time.monotonic()
        self._bars: Progress | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim", markup=False),
                console=console,
                transient=True,
            )
            self._task = self._bars.add_task(title, total=total, note="")

    def __enter__(self) -> Stage:
        if self._bars is not None:
            self._bars.start()
        else:
            self._console.print(f"{self._title} ...")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def advance(self, note: str = "") -> None:
        """One step is done; ``note`` says what is going on now."""
        self._done += 1
        if self._bars is not None:
            self._bars.update(self._task, advance=1, note=note)
        elif time.monotonic() - self._last_line >= LOG_INTERVAL:
            self._last_line = time.monotonic()
            self._console.print(f"  {self._done}/{self._total}  {note}")

    def line(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        self._console.print(text)
