"""The documentation's sources: every public name has its entry, every page its place, links work.

What only the built pages can show, `make docs` checks: it fails at any warning of Sphinx and at any
link that leads nowhere.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tools import check_site, support_table

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MODULES = (
    "deqfuse",
    "deqfuse.functional",
    "deqfuse.testing",
    "deqfuse.robustness",
    "deqfuse.diagnostics",
    "deqfuse.nn",
    "deqfuse.data",
)
ENTRY = re.compile(r"^\.\. auto(?:class|function|exception):: (\S+)$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def entries() -> dict[str, str]:
    """The names with an entry in the reference, and the page that it is on."""
    found = {}
    for page in sorted((DOCS / "reference").glob("*.md")):
        for name in ENTRY.findall(page.read_text(encoding="utf-8")):
            assert name not in found, f"{name} is on {found[name]} and on {page.name}"
            found[name] = page.name
    return found


def resolved(name: str) -> object:
    module, _, symbol = name.rpartition(".")
    return getattr(importlib.import_module(module), symbol)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_an_entry(module: str) -> None:
    listed = [resolved(name) for name in entries()]
    names = importlib.import_module(module).__all__
    missing = [name for name in names if resolved(f"{module}.{name}") not in listed]
    assert not missing
    assert len(names) >= 2


def test_every_entry_is_public() -> None:
    for name in entries():
        module, _, symbol = name.rpartition(".")
        assert symbol in importlib.import_module(module).__all__, name


def pages() -> list[Path]:
    """The pages of the repository that are read as they are."""
    return [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), ROOT / "csrc" / "README.md"]


def test_every_link_between_pages_leads_to_a_file() -> None:
    missing, count = [], 0
    for page in pages():
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            target = link.partition("#")[0]
            if target and "://" not in link:
                count += 1
                if not (page.parent / target).exists():
                    missing.append(f"{page.relative_to(ROOT)}: {link}")
    assert not missing
    assert count > 100


def test_no_page_is_left_out() -> None:
    """An index names every page of its folder; Sphinx says so too, when it runs."""
    for folder in ("tutorials", "how-to", "reference", "explanation"):
        listed = (DOCS / folder / "index.md").read_text(encoding="utf-8").split()
        here = {page.stem for page in (DOCS / folder).glob("*.md")} - {"index"}
        assert not here - set(listed), folder


def test_the_support_table_asks_the_backends() -> None:
    lines = support_table.table().splitlines()
    assert "| `Broyden()` | no (3) | no (4) | yes |" in lines
    assert "| torch.bfloat16 | yes | yes | yes |" in lines
    assert "3. `cpu`: it solves with Anderson or Picard, not Broyden." in lines


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text('<p id="top"><a href="a/b.html#here">x</a></p>')
    (tmp_path / "a" / "b.html").write_text(
        '<h1 id="here">b</h1><a href="../index.html">x</a><a href="https://example.org">y</a>'
    )
    return tmp_path


def test_whole_links_are_counted(site: Path) -> None:
    assert check_site.broken(site) == ([], 2, 1)


@pytest.mark.parametrize("link", ["a/c.html", "a/b.html#there", "#nowhere", "a/picture.png"])
def test_a_broken_link_is_found(site: Path, link: str) -> None:
    (site / "index.html").write_text(f'<a href="{link}">x</a>')
    assert check_site.broken(site)[0] == [f"index.html: {link}"]
