"""Importing and installing: fresh processes, missing optional parts, what the wheel holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from deqfuse.backends import cpu_native

ROOT = Path(__file__).resolve().parents[2]

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


def test_the_library_needs_torch_only() -> None:
    told = check_python(
        """
        import sys

        for name in ("triton", "matplotlib", "numpy", "rich"):
            sys.modules[name] = None  # as if it were not installed
        import torch, deqfuse, deqfuse.info, deqfuse.robustness

        fusion = deqfuse.DEQFusion(16, 2)
        z, info = fusion([torch.randn(3, 16), torch.randn(3, 16)], return_info=True)
        (z.square().sum() + info.jacobian_penalty()).backward()
        deqfuse.info.main()
        """
    )
    assert "numpy halted" in told
    assert "pip install 'deqfuse[cli]'" in told


def test_so_says_the_wheel(wheel: Path) -> None:
    (metadata,) = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA")]
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: torch>=2.11"]
    command = [line.split()[1] for line in required if re.search("extra == .cli.", line)]
    assert sorted(name.rstrip(";") for name in command) == ["matplotlib", "numpy", "rich", "shtab"]


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
            ".github",
            "benchmarks",
            "csrc",
            "deqfuse",
            "docs",
            "examples",
            "tests",
            "tools",
            "triton_kernels",
        ):
            shutil.copytree(entry, copy / entry.name, ignore=built)
    return copy


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    arguments = ["wheel", "--no-build-isolation", "--wheel-dir", str(target), str(source_copy)]
    pip(arguments, DEQFUSE_BUILD="python")  # the extension has its own tests below
    (path,) = target.glob("deqfuse-*.whl")
    return path


def pip(arguments: list[str], **variables: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--quiet"]
    environment = os.environ | variables
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def test_wheel_holds_everything_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in SHIPPED if name not in names] == []
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "deqfuse").rglob("*.py")}
    assert sorted(modules - set(names)) == []
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "deqfuse",
        "deqfuse_command.py",
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_installed_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    pip(["install", "--target", str(tmp_path), str(wheel)])
    # -W error: the hint for a bare checkout must not appear for an installed package.
    output = check_python(
        """
        import importlib.metadata, importlib.resources
        import torch, deqfuse, deqfuse.info, deqfuse.triton_kernels, deqfuse.cli.main

        print(deqfuse.__file__)
        print(deqfuse.triton_kernels.__file__)
        assert deqfuse.__version__ == importlib.metadata.version("deqfuse")
        data = importlib.resources.files("deqfuse") / "data" / "numerals.npz"
        assert data.is_file()
        assert f"({deqfuse.__path__[0]})" in deqfuse.info.system_report()
        solver, adjoint = deqfuse.Anderson(1e-12, 300), deqfuse.Implicit(tol=1e-12)
        options = {"init": "contractive", "solver": solver, "adjoint": adjoint}
        fusion = deqfuse.DEQFusion(8, 2, num_groups=2, **options).double()
        xs = [torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        assert torch.autograd.gradcheck(lambda *xs: fusion(list(xs)), xs)
        """,
        "-W",
        "error:deqfuse",
        path=[tmp_path],
    )
    assert all(line.startswith(str(tmp_path)) for line in output.split())


def test_source_distribution_can_build_and_test(
    source_copy: Path, wheel: Path, tmp_path: Path
) -> None:
    build = "from setuptools import build_meta; build_meta.build_sdist({!r})"
    result = run_python(build.format(str(tmp_path)), cwd=source_copy)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = tmp_path.glob("deqfuse-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        *("setup.py", "pyproject.toml", "constraints-dev.txt", "Makefile", "LICENSE", ".ci/run"),
        *("triton_kernels/__init__.py", "deqfuse/py.typed", "deqfuse/data/numerals.npz"),
        *("csrc/README.md", "csrc/common/outcome.h", "csrc/cpu/kernels.inc"),
        *("csrc/cpu/ops_forward.cpp", "csrc/cpu/ops_backward.cpp", "csrc/cpu/tensors.h"),
        *("tests/sanitize/run", "tests/sanitize/check_kernels.cpp"),
        *(test.relative_to(ROOT).as_posix() for test in (ROOT / "tests").rglob("*.py")),
    }
    assert sorted(needed - names) == []
    arguments = ["wheel", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(path)]
    pip(arguments, DEQFUSE_BUILD="python")
    (again,) = tmp_path.glob("deqfuse-*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


# The C++ extension: built, refused, or left out with a reason


def build(source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build the extension beside its package in `source`, without CUDA even where torch has it."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {k: v for k, v in os.environ.items() if k not in ("DEQFUSE_BUILD", "CI")}
    environment |= {"CUDA_HOME": str(source / "nowhere")} | variables
    return subprocess.run(command, capture_output=True, text=True, cwd=source, env=environment)


@pytest.fixture
def small_source(source_copy: Path, tmp_path: Path) -> Path:
    """The tree with kernels that compile at once."""
    copy = tmp_path / "small"
    shutil.copytree(source_copy, copy)
    for source in (copy / "csrc" / "cpu").glob("*.cpp"):
        source.write_text("")
    return copy


def built(source: Path) -> list[Path]:
    return [*(source / "deqfuse").glob("*.so"), *(source / "build").glob("lib*/deqfuse/*.so")]


needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or "CXX" in os.environ, reason="needs a C++ compiler called c++"
)


def test_without_a_compiler_the_build_goes_on_and_says_so(small_source: Path) -> None:
    result = build(small_source, CXX="/nonexistent/c++")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("deqfuse:")]
    assert "without the compiled CPU backend: no C++ compiler" in line
    assert "install GCC or Clang" in line


def test_a_missing_compiler_is_an_error_when_asked_for(small_source: Path) -> None:
    result = build(small_source, CXX="/nonexistent/c++", DEQFUSE_BUILD="cpu")
    assert result.returncode != 0
    assert "cannot build the compiled CPU backend: no C++ compiler" in result.stderr


def test_a_build_without_torch_says_so(small_source: Path) -> None:
    (small_source / "torch.py").write_text("raise ImportError('no torch here')")
    told = build(small_source, PYTHONPATH=str(small_source))
    assert told.returncode == 0, told.stderr
    assert "no torch here; install torch, then: pip install" in told.stderr
    refused = build(small_source, PYTHONPATH=str(small_source), DEQFUSE_BUILD="cpu")
    assert refused.returncode != 0
    assert "pip install --no-build-isolation ." in refused.stderr
    assert build(small_source, PYTHONPATH=str(small_source), DEQFUSE_BUILD="python").stderr == ""


@needs_compiler
def test_a_compile_error_leaves_no_module_behind(small_source: Path) -> None:
    result = build(small_source, DEQFUSE_BUILD="cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(built(small_source)) == 2  # in build/ and in place

    (small_source / "csrc" / "cpu" / "ops.cpp").write_text("#error broken on purpose")
    refused = build(small_source, DEQFUSE_BUILD="cpu")
    assert refused.returncode != 0
    assert "cannot build the compiled CPU backend" in refused.stderr
    told = build(small_source)
    assert told.returncode == 0, told.stderr
    assert "installing without the compiled CPU backend" in told.stderr
    assert built(small_source) == []


@needs_compiler
def test_warnings_are_errors_in_our_own_ci_only(small_source: Path) -> None:
    (small_source / "csrc" / "cpu" / "ops.cpp").write_text("int f() { int unused; return 0; }")
    assert build(small_source, DEQFUSE_BUILD="cpu", CI="true").returncode != 0
    assert build(small_source, CI="true").returncode == 0
    assert len(built(small_source)) == 2


def test_unknown_switch_is_refused(source_copy: Path) -> None:
    result = build(source_copy, DEQFUSE_BUILD="gpu")
    assert result.returncode != 0
    assert "DEQFUSE_BUILD: expected auto, python, cpu or cuda, got 'gpu'" in result.stderr


@pytest.mark.skipif(cpu_native.module is None, reason="the C++ extension was not built")
def test_module_built_here_belongs_to_these_sources() -> None:
    assert cpu_native.module is not None
    # One file for all versions of Python: it asks for nothing of theirs.
    assert (
        re.findall(rb"\0(_?Py\w{4,}|lib\w*python[\w.]*)\0", cpu_native.module.path.read_bytes())
        == []
    )
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".inc")]
    newest = max(p.stat().st_mtime for p in sources)
    assert cpu_native.module.path.stat().st_mtime >= newest, "run: make module"


@pytest.mark.slow
@needs_compiler
def test_wheel_with_the_extension(source_copy: Path, tmp_path: Path) -> None:
    arguments = ["wheel", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source_copy)]
    pip(arguments, DEQFUSE_BUILD="cpu")
    (path,) = tmp_path.glob("deqfuse-*-cp310-abi3-*.whl")
    names = zipfile.ZipFile(path).namelist()
    assert [name for name in names if name == "deqfuse/_cpu.so"]
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "deqfuse",
        "deqfuse_command.py",
    }
    pip(["install", "--target", str(tmp_path / "there"), str(path)])
    output = check_python(
        "from deqfuse.backends import cpu_native; print(cpu_native.module.path)",
        path=[tmp_path / "there"],
    )
    assert output.startswith(str(tmp_path))
