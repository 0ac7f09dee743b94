"""Every Python block of the pages and of the docstrings runs as it is written."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import deqfuse

ROOT = Path(__file__).resolve().parents[2]
# A file of the project by its path, as pages and comments name it.
NAMED = re.compile(
    r"(?<![\w/])(?:deqfuse|csrc|triton_kernels|tests|tools|docs|benchmarks|examples|backends|operators|nn|"
    r"solvers|diagnostics|common|cpu|cuda)/[\w/.-]*\w\.(?:py|md|h|cpp|cuh|inc|cu)\b"
)
PLACES = ("", "deqfuse", "csrc")  # that such a path may start from
BLOCK = re.compile(r"^```(?:python|\{code-cell\} ipython3)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def pages() -> list[pytest.ParameterSet]:
    """Pages with Python in them; a page that compiles is slow."""
    found = []
    for path in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]:
        if BLOCK.search(text := path.read_text(encoding="utf-8")):
            marks = pytest.mark.slow if "aoti_compile" in text else ()
            found.append(pytest.param(path, id=path.relative_to(ROOT).as_posix(), marks=marks))
    return found


def examples() -> list[pytest.ParameterSet]:
    """Docstrings with an example: the source of its prompts."""
    found = {}
    for info in pkgutil.walk_packages(deqfuse.__path__, "deqfuse."):
        if not info.name.startswith(("deqfuse.triton_kernels", "deqfuse._")):
            module = importlib.import_module(info.name)
            for test in doctest.DocTestFinder(recurse=True).find(module):
                if test.examples:
                    found[test.name] = "".join(e.source for e in test.examples)
    return [pytest.param(source, id=name) for name, source in found.items()]


@pytest.mark.parametrize("page", pages())
def test_blocks_of_a_page_in_their_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for what they write
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(block, namespace)


@pytest.mark.parametrize("source", examples())
def test_examples_of_docstrings(source: str) -> None:
    torch.manual_seed(0)
    exec(source, {})


def texts() -> list[Path]:
    """Pages, and the sources with their comments."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("csrc/**/*.*")]
    code = [p for d in ("deqfuse", "triton_kernels", "tools") for p in (ROOT / d).rglob("*.py")]
    return sorted(p for p in [*pages, *code] if p.suffix in (".md", ".py", ".h", ".cpp", ".cuh"))


def test_every_file_that_is_named_is_there() -> None:
    missing = []
    for path in texts():
        for name in NAMED.findall(path.read_text(encoding="utf-8")):
            if not any((ROOT / place / name).exists() for place in PLACES):
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert not missing
    assert len(texts()) > 100


def test_nothing_is_left_out() -> None:
    """The search above finds what is there to be found."""
    found = {p.id for p in pages()}
    assert found >= {"README.md", "docs/how-to/compile.md", "docs/tutorials/first-layer.md"}
    documented = [inspect.getdoc(getattr(deqfuse, name)) or "" for name in deqfuse.__all__]
    assert len(examples()) >= sum("Example:" in text for text in documented) >= 3
