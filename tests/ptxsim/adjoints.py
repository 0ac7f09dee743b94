"""The CUDA adjoint on the emulator: its compiled host code on a CUDA runtime that launches there.

Needs nvcc. Kernels are compiled to PTX and no further; the rest of each file is the library's own.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import emulator
import torch
from torch.utils import cpp_extension

ROOT = emulator.HERE.parents[1]


def load_build() -> ModuleType:
    """``csrc/cuda/build.py``, which knows where nvcc is."""
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc/cuda/build.py")
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def built() -> Path:
    """A folder with libadjoint.so and the PTX of its kernels, of these sources."""
    build = load_build()
    sources = [p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in (".h", ".cuh", ".cu")]
    runtime = emulator.HERE / "cuda" / "runtime.cpp"
    arch = f"compute_{os.environ.get('PTXSIM_ARCH', '80')}"
    digest = hashlib.sha256(f"{arch} {build.toolkit()} {torch.__version__}".encode())
    for source in [*sorted(sources), runtime]:
        digest.update(source.read_bytes())
    made = emulator.BUILD / f"adjoint-{digest.hexdigest()[:12]}"
    if made.exists():
        return made
    with tempfile.TemporaryDirectory(dir=emulator.BUILD) as name:
        folder = Path(name)
        nvcc = [build.toolkit() / "bin" / "nvcc", "-std=c++17", "-O3", "-lineinfo"]
        nvcc += [f"-gencode=arch={arch},code={arch}", "-Xcompiler=-fPIC"]

        def compile_one(source: Path) -> Path:
            part = folder / source.stem
            part.mkdir()
            keep = ["-keep", "-keep-dir", part]
            subprocess.run([*nvcc, *keep, "-c", source, "-o", part / "made.o"], check=True)
            (part / f"{source.stem}.ptx").rename(folder / f"{source.stem}.ptx")
            return part / "made.o"

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, build.KERNELS))
        include = [f"-I{path}" for path in cpp_extension.include_paths()]
        flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        linked = ["-shared", "-Wl,-Bsymbolic", runtime, *objects, "-o", folder / "libadjoint.so"]
        linked += [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu"]
        subprocess.run([*emulator.compiler(), *flags, *include, *linked], check=True)
        for part in folder.iterdir():
            if part.is_dir():
                subprocess.run(["rm", "-r", part], check=True)
        try:
            os.rename(folder, made)
        except OSError:  # another process was faster
            return made
        folder.mkdir()  # for the context to remove
    return made


_folder = built()
lib = ctypes.CDLL(str(_folder / "libadjoint.so"))
lib.emu_kernel.argtypes = [
    ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_uint32),
]  # fmt: skip
lib.emu_options.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
lib.emu_unwritten.restype = lib.emu_launches.restype = ctypes.c_char_p
torch.ops.load_library(str(_folder / "libadjoint.so"))
texts: dict[str, str] = {}  # PTX of the file that a kernel is in


def take(name: str, text: str) -> None:
    """Launches of this kernel run this text from now on."""
    module = emulator.load(text)
    layout = emulator.kernels(module)[name]
    flat = [number for pair in layout for number in pair]
    lib.emu_kernel(name.encode(), module, len(layout), (ctypes.c_uint32 * len(flat))(*flat))


for _file in sorted(_folder.glob("*.ptx")):
    _text = _file.read_text()
    _module = emulator.load(_text)
    for _name, _layout in emulator.kernels(_module).items():
        texts[_name] = _text
        _flat = [number for pair in _layout for number in pair]
        _array = (ctypes.c_uint32 * len(_flat))(*_flat)
        lib.emu_kernel(_name.encode(), _module, len(_layout), _array)


class Emulated:
    """In place of ``deqfuse.backends.cuda_native``."""

    adjoint_cells = staticmethod(torch.ops.ptxsim.cuda_adjoint_cells.default)
    adjoint_fuse = staticmethod(torch.ops.ptxsim.cuda_adjoint_fuse.default)


def playing(shared_limit: int, seed: int) -> None:
    """The device's shared memory, which decides how problems are cut, and the order of warps."""
    lib.emu_options(shared_limit, seed, 1)
