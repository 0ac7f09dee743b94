"""A report as a page in Markdown: tables, and pictures as files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deqfuse.reports.page import Report, Table

__all__ = ["render"]


def render(report: Report, facts: Mapping[str, str]) -> str:
    """The whole page."""
    parts = [f"# {report.title}", report.lead]
    for section in report.sections:
        parts.append(f"## {section.title}")
        parts.extend(text for text in section.paragraphs if text)
        if section.table is not None:
            parts.extend(_table(section.table))
        if section.picture is not None:
            parts.append(f"![{section.picture.alt}]({section.picture.name})")
            parts.append(section.picture.caption)
    parts.append("## Machine, versions, command")
    parts.append("\n".join(f"- {name}: `{value}`" for name, value in facts.items()))
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(table.headers) - 1)
    lines = [line(table.headers), rule, *map(line, table.rows)]
    return ["\n".join(lines), *table.notes]
