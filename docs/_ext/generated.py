"""``{generated}``: a directive whose content is what a function returns as Markdown.

Tables of what the code itself knows are made when the pages are built, and so cannot be out of
date: the support table, the help texts of the command line.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Generated(SphinxDirective):
    """``module:function``, called without arguments."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].partition(":")
        text = getattr(importlib.import_module(module), name)()
        return self.parse_text_to_nodes(text)


def command_line() -> str:
    """The help of every command, each below its name."""
    from deqfuse.cli.options import parser

    parts = []
    for words, command in _commands(["deqfuse"], parser()):
        title = "" if len(words) == 1 else f"## {' '.join(words)}\n\n"
        parts.append(f"{title}```text\n{command.format_help()}```")
    return "\n\n".join(parts)


def _commands(
    words: list[str], parser: argparse.ArgumentParser
) -> Iterator[tuple[list[str], argparse.ArgumentParser]]:
    """A parser and those of its commands, whose lines are as wide as on a terminal of 80."""
    yield words, parser
    for action in parser._actions:  # argparse has no public way to them
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from _commands([*words, name], command)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("generated", Generated)
    return {"parallel_read_safe": True}
