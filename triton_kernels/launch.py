"""All kernels are launched by this module, so that tests can count and inspect launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """A kernel about to run: what the runtime would be given."""

    kernel: Any  # triton.JITFunction, or its twin under the interpreter
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]  # constexprs by name, num_warps, num_stages

    def run(self) -> None:
        self.kernel[self.grid](*self.args, **self.options)

    @property
    def name(self) -> str:
        name: str = self.kernel.fn.__name__
        return name


_handler: Callable[[Launch], Any] = Launch.run


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run ``kernel`` on ``grid``; an empty grid launches nothing."""
    if 0 not in grid:
        _handler(Launch(kernel, grid, args, options))


@contextmanager
def intercept(handler: Callable[[Launch], Any]) -> Iterator[None]:
    """Hand every launch to ``handler``, which may run it, compile it or only note it."""
    global _handler
    before, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = before


@contextmanager
def counted() -> Iterator[list[str]]:
    """Run launches as ever and collect the kernels' names in order."""
    names: list[str] = []
    outer = _handler

    def note(call: Launch) -> None:
        names.append(call.name)
        outer(call)

    with intercept(note):
        yield names
