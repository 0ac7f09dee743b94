"""What a report says, whatever form its page has: sections, tables, pictures, numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["NOTHING", "Picture", "Report", "Section", "Table", "file_name", "plain"]

NOTHING = "-"  # a table's cell without a meaning


@dataclass(frozen=True)
class Table:
    """Text cells, for the terminal and for the page alike."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows; ``file`` is its name in the folder, made of ``alt`` if not given."""

    png: bytes
    alt: str
    caption: str
    file: str = ""

    @property
    def name(self) -> str:
        """File name."""
        return self.file or file_name(self.alt)


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, and then a table or a picture."""

    title: str
    paragraphs: tuple[str, ...] = ()
    table: Table | None = None
    picture: Picture | None = None


@dataclass(frozen=True)
class Report:
    """What the page shows, and the numbers behind its tables."""

    title: str
    lead: str
    sections: Sequence[Section]
    summary: Mapping[str, Any] = field(default_factory=dict)


def file_name(alt: str) -> str:
    """Name of the picture with this description."""
    return re.sub(r"[^a-z0-9]+", "-", alt.lower()).strip("-") + ".png"


def plain(value: Any) -> Any:
    """The same without what JSON does not know: a number that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
