"""Importing and installing: fresh processes, missing optional parts, what the wheel holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Everything that an installed deqfuse must bring besides its modules.
SHIPPED = [
    "deqfuse/__init__.py",
    "deqfuse/py.typed",
    "deqfuse/data/numerals.npz",
    "deqfuse/data/DATA_LICENSE.md",
    "deqfuse/triton_kernels/__init__.py",
]


def run_python(
    code: str, *flags: str, path: list[Path] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter outside the source tree, `path` first on sys.path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, *flags, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd or "/")


def check_python(code: str, *flags: str, path: list[Path] | None = None) -> str:
    result = run_python(code, *flags, path=path)
    assert result.returncode == 0, result.stderr
    return result.stdout


# Import in a fresh process


def test_import_is_quiet_and_touches_no_optional_part() -> None:
    check_python(
        """
        import subprocess, sys
        import torch

        def refuse(*args, **kwargs):
            raise AssertionError(f"import started a process, a compiler perhaps: {args}")

        subprocess.Popen.__init__ = refuse
        before = set(sys.modules)
        import deqfuse

        assert not torch.cuda.is_initialized(), "import initialised CUDA"
        for name in ("triton", "matplotlib", "rich", "torch.utils.cpp_extension"):
            assert name not in sys.modules or name in before, f"import loaded {name}"
        """
    )


@pytest.mark.parametrize("missing", ["triton", "matplotlib", "rich"])
def test_import_works_without_an_optional_part(missing: str) -> None:
    check_python(
        f"""
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name == {missing!r} or name.startswith({missing + "."!r}):
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Blocker())
        import deqfuse
        """
    )


def test_all_names_are_there() -> None:
    import deqfuse

    assert len(set(deqfuse.__all__)) == len(deqfuse.__all__)
    assert [name for name in deqfuse.__all__ if not hasattr(deqfuse, name)] == []


# A source tree that is on sys.path without being installed


def test_bare_checkout_says_that_it_is_not_installed(tmp_path: Path) -> None:
    # The packages of this environment, without deqfuse and without the hook of an editable install
    # (-S: no .pth files are read).
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in sys.path:
        if Path(folder).name in ("site-packages", "dist-packages"):
            for entry in Path(folder).iterdir():
                if "deqfuse" not in entry.name and not (packages / entry.name).exists():
                    (packages / entry.name).symlink_to(entry)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "deqfuse").symlink_to(ROOT / "deqfuse")
    result = run_python("import deqfuse", "-S", path=[checkout, packages])
    assert result.returncode == 0, result.stderr
    assert "not installed" in result.stderr
    assert "pip install" in result.stderr


# Wheel and source distribution


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as someone else would get it; building in it leaves nothing in this one."""
    copy = tmp_path_factory.mktemp("source")
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for entry in ROOT.iterdir():
        if entry.is_file():
            shutil.copy2(entry, copy)
        elif entry.name in (
            ".ci",
            "benchmarks",
            "deqfuse",
            "docs",
            "tests",
            "tools",
            "triton_kernels",
        ):
            shutil.copytree(entry, copy / entry.name, ignore=built)
    return copy


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    pip(["wheel", "--no-build-isolation", "--wheel-dir", str(target), str(source_copy)])
    (path,) = target.glob("deqfuse-*.whl")
    return path


def pip(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stdout + result.stderr


def test_wheel_holds_everything_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in SHIPPED if name not in names] == []
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "deqfuse").rglob("*.py")}
    assert sorted(modules - set(names)) == []
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"deqfuse"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_installed_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    pip(["install", "--target", str(tmp_path), str(wheel)])
    # -W error: the hint for a bare checkout must not appear for an installed package.
    output = check_python(
        """
        import importlib.metadata, importlib.resources
        import torch, deqfuse, deqfuse.triton_kernels, deqfuse.cli.main

        print(deqfuse.__file__)
        print(deqfuse.triton_kernels.__file__)
        assert deqfuse.__version__ == importlib.metadata.version("deqfuse")
        data = importlib.resources.files("deqfuse") / "data" / "numerals.npz"
        assert data.is_file()
        fusion = deqfuse.DEQFusion(16, 2)
        assert fusion([torch.randn(3, 16), torch.randn(3, 16)]).shape == (3, 16)
        """,
        "-W",
        "error:deqfuse",
        path=[tmp_path],
    )
    assert all(line.startswith(str(tmp_path)) for line in output.split())


def test_source_distribution_can_build_and_test(source_copy: Path, tmp_path: Path) -> None:
    build = "from setuptools import build_meta; build_meta.build_sdist({!r})"
    result = run_python(build.format(str(tmp_path)), cwd=source_copy)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = tmp_path.glob("deqfuse-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        *("setup.py", "pyproject.toml", "constraints-dev.txt", "Makefile", "LICENSE", ".ci/run"),
        *("triton_kernels/__init__.py", "deqfuse/py.typed", "deqfuse/data/numerals.npz"),
        *(f"tests/{test.name}" for test in (ROOT / "tests").glob("*.py")),
    }
    assert sorted(needed - names) == []
