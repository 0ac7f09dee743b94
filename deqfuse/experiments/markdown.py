"""A report page in Markdown: tables, and pictures as files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deqfuse.cli.report import Section
from deqfuse.cli.summary import Table

__all__ = ["file_name", "render"]


def render(
    title: str, lead: str, sections: Sequence[Section], facts: Sequence[tuple[str, str]]
) -> tuple[str, dict[str, bytes]]:
    """The page, and file name -> PNG of its pictures."""
    pictures: dict[str, bytes] = {}
    parts = [f"# {title}", lead]
    for section in sections:
        parts.append(f"## {section.title}")
        parts.extend(text for text in section.paragraphs if text)
        if section.table is not None:
            parts.extend(_table(section.table))
        if section.picture is not None:
            name = file_name(section.picture.alt)
            pictures[name] = section.picture.png
            parts.append(f"![{section.picture.alt}]({name})")
            parts.append(section.picture.caption)
    parts.append("## Machine, versions, command")
    parts.append("\n".join(f"- {name}: `{value}`" for name, value in facts))
    return "\n\n".join(parts) + "\n", pictures


def file_name(alt: str) -> str:
    """Name of the picture with this description."""
    return re.sub(r"[^a-z0-9]+", "-", alt.lower()).strip("-") + ".png"


def _table(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(table.headers) - 1)
    lines = [line(table.headers), rule, *map(line, table.rows)]
    return ["\n".join(lines), *table.notes]
