"""Compiles the CUDA kernels: for setup.py, for tests, and for the table of what each kernel needs.

    python csrc/cuda/build.py --table   # rewrites docs/explanation/kernels-gpu-adjoint.md; minutes

No GPU is needed, nor a torch with CUDA: the operators use torch's stable ABI only.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCAL = Path("/usr/local")
KERNELS = sorted(HERE.glob("kernels_*.cu"))
DOCUMENT = HERE.parents[1] / "docs" / "explanation" / "kernels-gpu-adjoint.md"
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")  # those that the compiler knows
OLDEST = (8, 0)
# What torch calls architectures in TORCH_CUDA_ARCH_LIST.
NAMES = {
    "Kepler": "3.5", "Maxwell": "5.0", "Pascal": "6.0", "Volta": "7.0", "Turing": "7.5",
    "Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}  # fmt: skip


class ToolkitMissing(RuntimeError):
    """There is no CUDA toolkit that can compile and link; the message says what was looked for."""


def toolkit() -> Path:
    """The toolkit's own folder: a compiler on PATH may be a shim that compiles and cannot link.

    Without ``CUDA_HOME`` the newest of the CUDA that torch was built with: the driver that runs
    torch knows it. Else the newest, else that of an nvcc on PATH.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")  # of Linux distributions and of conda
    found = [Path(on_path).resolve().parents[1]] if on_path else []
    folders = [Path(named)] if named else [*_installed(), LOCAL / "cuda", *found]
    for folder in folders:
        runtime = [
            *folder.glob("lib*/libcudart_static.a"),
            *folder.glob("lib/*/libcudart_static.a"),
            *folder.glob("targets/*/lib/libcudart*"),
        ]
        if (folder / "bin" / "nvcc").exists() and runtime:
            return folder
    looked = ", ".join(map(str, folders))
    raise ToolkitMissing(f"no nvcc with libcudart in {looked}; set CUDA_HOME to a CUDA toolkit")


def _installed() -> list[Path]:
    import torch

    major = int((torch.version.cuda or "0").partition(".")[0])

    def order(folder: Path) -> tuple[bool, list[int]]:
        version = [int(n) for n in re.findall(r"\d+", folder.name)]
        return version[:1] == [major], version

    return sorted(LOCAL.glob("cuda-*"), key=order, reverse=True)


def default_archs() -> str:
    """Those of ``DEFAULT_ARCHS`` that the compiler knows, PTX of the newest for later ones."""
    known = run([toolkit() / "bin" / "nvcc", "--list-gpu-arch"]).split()
    archs = [a for a in DEFAULT_ARCHS if f"compute_{a.replace('.', '')}" in known]
    if not archs:
        raise RuntimeError(
            f"nvcc {toolkit_version()} knows none of {', '.join(DEFAULT_ARCHS)}; "
            "set CUDA_HOME to a CUDA toolkit that does"
        )
    return ";".join(archs) + "+PTX"


def wanted(archs: str) -> list[str]:
    """The architectures of a list as in ``TORCH_CUDA_ARCH_LIST``, such as ``8.0;Hopper+PTX``.

    Those below 8.0 are left out, with a message: the list is often that of all of a machine's
    extensions, and the rest of the library is of use without them.
    """
    entries, found = re.split(r"[;,\s]+", archs), []
    while entries:
        entry = entries.pop(0)
        name = entry.partition("+")[0]
        if entry in ("All", "Common"):
            entries = [*default_archs().split(";"), *entries]
        elif name in NAMES:
            entries = [*NAMES[name].split(";"), *entries]
        elif match := re.fullmatch(r"(\d+)\.(\d+)[af]?(\+PTX)?", entry):
            if (int(match[1]), int(match[2])) >= OLDEST:
                found.append(entry)
            else:
                print(
                    f"deqfuse: no CUDA kernels for compute capability {name}, "
                    "which lacks what they need: 8.0 or later",
                    file=sys.stderr,
                )
        elif entry:
            raise ValueError(
                "TORCH_CUDA_ARCH_LIST: expected numbers like 9.0 or 9.0+PTX, or names like "
                f"{', '.join(list(NAMES)[-3:])}, separated by ';', got {entry!r}"
            )
    if not found:
        raise ValueError(
            "TORCH_CUDA_ARCH_LIST: expected a compute capability of 8.0 or later, got "
            f"{archs!r}. Remedy: add one, such as 9.0, or unset it"
        )
    return list(dict.fromkeys(found))


def targets(archs: Sequence[str]) -> list[str]:
    """nvcc's arguments for architectures that :func:`wanted` has looked at."""
    flags = []
    for entry in archs:
        number, ptx, _ = entry.partition("+")
        name = number.replace(".", "")
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags


def run(command: list[str | Path]) -> str:
    """What the compiler said; its messages are the error if it fails."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def make(target: Path, command: list[str | Path]) -> str:
    """What ``command -o target`` says; what it said if target is newer than all sources."""
    log, line = target.with_suffix(".log"), f"{command}\n"
    sources = (p for p in HERE.parent.rglob("*.*") if p.suffix in (".h", ".cuh", ".cu", ".cpp"))
    newest = max(path.stat().st_mtime for path in sources)
    if target.exists() and target.stat().st_mtime > newest and log.exists():
        before, said = log.read_text().partition("\n")[::2]
        if f"{before}\n" == line:
            return said
    log.unlink(missing_ok=True)
    said = run([*command, "-o", target])
    log.write_text(line + said)
    return said


def compile_kernels(
    archs: str, out: Path, cxx: Sequence[str] = (), strict: bool = False, jobs: int | None = None
) -> dict[Path, str]:
    """Objects of all kernel files, each with what the compiler said about it.

    ``cxx`` is the command of the host compiler; without it nvcc takes the first on PATH.
    """
    nvcc = toolkit() / "bin" / "nvcc"
    flags: list[str | Path] = [
        "-std=c++17",
        "-O3",
        "-Xptxas=-v",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
    ]
    flags += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"] if strict else []
    flags += [*host_compiler(cxx), *targets(wanted(archs))]
    out.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> tuple[Path, str]:
        made = out / f"{source.stem}.o"
        return made, make(made, [nvcc, *flags, "-c", source])

    jobs = jobs or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        return dict(pool.map(compile_one, KERNELS))


def host_compiler(cxx: Sequence[str]) -> list[str | Path]:
    """nvcc's argument for the compiler in a command, whose first word may be a cache's."""
    programs = [word for word in cxx if not word.startswith("-")]
    return [f"-ccbin={programs[-1]}"] if programs else []


def build_library(archs: str, out: Path, cxx: list[str], strict: bool = False) -> Path:
    """``out/_cuda.so``: operators and kernels. The CUDA runtime is in it: torch's may differ."""
    import torch
    from torch.utils import cpp_extension

    folder = toolkit()
    operators, library = out / "ops.o", out / "_cuda.so"
    objects = list(compile_kernels(archs, out, cxx, strict))
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter", *(["-Werror"] if strict else [])]
    include = [f"-I{path}" for path in (*cpp_extension.include_paths(), folder / "include")]
    defines = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags = ["-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", *warnings, *defines]
    make(operators, [*cxx, *flags, *include, "-c", HERE / "ops.cpp"])
    torch_lib = Path(torch.__file__).parent / "lib"
    link = ["-shared", "-Xcompiler=-fPIC", "-Xlinker=--no-as-needed", f"-L{torch_lib}"]
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu"]
    linker = [folder / "bin" / "nvcc", *host_compiler(cxx)]
    make(library, [*linker, *link, *objects, operators, *libraries])
    return library


# ---- what each kernel needs ----------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """What ptxas said about one kernel."""

    kernel: str
    registers: int
    spilled: int  # bytes, stores and loads
    stack: int


_ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '\S+'.*?(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def resources(said: str) -> list[Resources]:
    """The kernels in the compiler's output."""
    found = [
        Resources(_readable(name), int(registers), int(stores) + int(loads), int(stack))
        for name, stack, stores, loads, registers in _ENTRY.findall(said)
    ]
    return sorted(found, key=lambda r: r.kernel)


def _readable(symbol: str) -> str:
    """Kernel and template arguments of a mangled name."""
    kernel = re.search(r"\d+(adjoint_\w+?_kernel|vector_gradient_kernel)", symbol)
    kind = "cell" if "8CellTile" in symbol else "fuse" if "8FuseTile" in symbol else ""
    number = "float64" if re.search(r"(?:TileE|gradient_kernelI)d", symbol) else "float32"
    rows = re.search(r"Li(\d+)E", symbol)
    where = {"1": "resident", "0": "streamed"}.get((re.search(r"Lb([01])E", symbol) or "  ")[1])
    assert kernel is not None, symbol
    parts = (kernel[1], kind, number, where, f"{rows[1]} rows" if rows else None)
    return " ".join(part for part in parts if part)


def all_resources(arch: str, out: Path) -> list[Resources]:
    """Of all kernels, for one architecture such as ``9.0``."""
    said = compile_kernels(arch, out, strict=True).values()
    found = {r.kernel: r for text in said for r in resources(text)}
    return [found[name] for name in sorted(found)]


def table(by_arch: dict[str, list[Resources]]) -> str:
    """Markdown, one line for each kernel."""
    head = ["kernel", *(f"sm_{arch.replace('.', '')}" for arch in by_arch)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(by_arch)]
    for same in zip(*by_arch.values(), strict=True):
        cells = [f"{r.registers} / {r.spilled}" for r in same]
        lines.append("| " + " | ".join([f"`{same[0].kernel}`", *cells]) + " |")
    return "\n".join(lines)


SHARED = {
    "8.0": 163,
    "9.0": 227,
    "10.0": 227,
    "12.0": 99,
}  # KiB of shared memory that a block can have


def tiles() -> str:
    """How problems are cut: markdown, one line for each width and number type."""
    from deqfuse.backends import cpu_native

    assert cpu_native.module is not None, cpu_native.load_error
    lines = ["| d | dtype | " + " | ".join(f"sm_{a.replace('.', '')}" for a in SHARED) + " |"]
    lines.append("|---:|---|" + "---|" * len(SHARED))
    for dim in (32, 64, 96, 128, 192, 256, 512):
        for dtype, size in (("float32", 4), ("float64", 8)):
            cells = []
            for kib in SHARED.values():
                cpu_native.module.host_device(kib * 1024)
                plan = cpu_native.module.host_plan(dim, 4, size)
                bytes_each = f"{plan['bytes'] / 1024:.0f} KiB"
                cells.append(f"{plan['cut']}, {plan['rows']} rows, {bytes_each}")
            lines.append(f"| {dim} | {dtype} | " + " | ".join(cells) + " |")
    cpu_native.module.host_device()
    return (
        "\n".join(lines) + "\n\nBytes: shared memory of a block; for steps global memory of a tile."
    )


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: python csrc/cuda/build.py --table -->", f"<!-- end of {name} -->"


def written(name: str) -> str:
    """The table of this name ("tiles", "resources") as the document has it."""
    begin, end = _marks(name)
    return DOCUMENT.read_text().partition(begin)[2].partition(end)[0].strip()


def write(name: str, made: str) -> None:
    """Replaces that table."""
    begin, end = _marks(name)
    before, _, rest = DOCUMENT.read_text().partition(begin)
    DOCUMENT.write_text(f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}")


def columns(markdown: str) -> dict[str, list[str]]:
    """The cells of a table below each heading."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: [row[i] for row in rows[2:]] for i, name in enumerate(rows[0])}


def toolkit_version() -> str:
    """Of the compiler here, such as ``13.0.88``."""
    return re.findall(r"V([\d.]+)", run([toolkit() / "bin" / "nvcc", "--version"]))[0]


def written_with() -> str:
    """The compiler of the written table."""
    return (re.findall(r"nvcc ([\d.]*\d)", written("resources")) or [""])[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--table", action="store_true", required=True, help="rewrite the tables")
    parser.parse_args()
    write("tiles", tiles())
    with tempfile.TemporaryDirectory() as folder:
        made = table({arch: all_resources(arch, Path(folder) / arch) for arch in SHARED})
    write("resources", f"{made}\n\nnvcc {toolkit_version()}.")


if __name__ == "__main__":
    main()
