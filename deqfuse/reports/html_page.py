"""A report as one HTML page that opens without a network: pictures inside, no scripts."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping

from deqfuse.reports.page import Picture, Report, Table

__all__ = ["render"]

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #222;
       background: #fff; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .4rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; }
p { max-width: 46rem; } .lead { color: #555; margin-top: 0; }
img { width: 100%; height: auto; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: .88rem; max-width: 50rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .42rem .8rem .42rem 0; text-align: right;
         border-bottom: 1px solid #e2e2e2; white-space: nowrap; }
th { font-weight: 600; border-bottom: 2px solid #999; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
ul.notes { color: #555; font-size: .88rem; padding-left: 1.1rem; }
.facts { font-size: .85rem; color: #444; } .facts td { text-align: left; border: 0;
         white-space: normal; padding: .12rem 1.2rem .12rem 0; vertical-align: top; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .92em; }
"""


def render(report: Report, facts: Mapping[str, str]) -> str:
    """The whole page. All text is escaped; nothing refers to another file or host."""
    title = html.escape(report.title)
    parts = [f"<h1>{title}</h1>", f'<p class="lead">{html.escape(report.lead)}</p>']
    for section in report.sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts.extend(f"<p>{html.escape(text)}</p>" for text in section.paragraphs if text)
        if section.table is not None:
            parts.append(_table(section.table))
        if section.picture is not None:
            parts.append(_picture(section.picture))
    parts.append("<h2>Machine, versions, command</h2>")
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(value)}</code></td></tr>"
        for name, value in facts.items()
    )
    parts.append(f'<table class="facts">{rows}</table>')
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.headers)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in table.rows
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n'
        f'</table></div>\n<ul class="notes">{notes}</ul>'
    )


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure><img alt="{html.escape(picture.alt)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )
