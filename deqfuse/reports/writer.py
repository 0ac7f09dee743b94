"""The one writer of reports: a page, its numbers as JSON, its pictures, into the output folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deqfuse.reports import html_page, markdown_page
from deqfuse.reports.folder import OutputFolder
from deqfuse.reports.page import Report, plain

__all__ = ["HTML", "MARKDOWN", "Form", "write_report"]


@dataclass(frozen=True)
class Form:
    """What the page is written as, and what the files are called."""

    page: str
    numbers: str
    render: Callable[[Report, Mapping[str, str]], str]

    @property
    def files(self) -> tuple[str, str]:
        """Names of the files of every report; the pictures come on top."""
        return self.page, self.numbers


HTML = Form("index.html", "results.json", html_page.render)  # opens in a browser, all in one file
MARKDOWN = Form("README.md", "summary.json", markdown_page.render)  # what repositories show


def write_report(out: OutputFolder, report: Report, facts: Mapping[str, str], form: Form) -> Path:
    """Write all files or none; returns the path of the page.

    Args:
        out: the folder.
        report: what to say.
        facts: name -> text, how the numbers came about.
        form: ``HTML`` or ``MARKDOWN``.

    Raises:
        OutputRefused: the folder or one of the files is somebody else's, or the disk is full.
    """
    numbers = plain({**report.summary, "facts": dict(facts)})
    text = json.dumps(numbers, indent=1, allow_nan=False) + "\n"
    pictures = [section.picture for section in report.sections if section.picture is not None]
    files = {form.page: form.render(report, facts).encode(), form.numbers: text.encode()}
    out.write({**files, **{picture.name: picture.png for picture in pictures}})
    return out.path / form.page
