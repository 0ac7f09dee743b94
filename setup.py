"""Build only: which folder becomes which package, and the compiled parts. Metadata: pyproject.toml.

DEQFUSE_BUILD decides about those: "auto" (default) builds the C++ extension where torch and a
C++ compiler are there, the CUDA library where torch has CUDA and there is a toolkit, and
installs without what cannot be built, saying why; "cpu" makes a missing extension an error and
builds no CUDA; "cuda" builds both, with or without a GPU or a torch with CUDA, or fails; "python"
leaves both out. docs/reference/environment.md lists all switches.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import setuptools

# An older setuptools stops at the licence field with a message that does not name the cause.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"deqfuse needs setuptools >= 77.0.3 to be built, found {setuptools.__version__}; "
        "run: python -m pip install -U setuptools"
    )

SWITCH = os.environ.get("DEQFUSE_BUILD", "auto")
if SWITCH not in ("auto", "python", "cpu", "cuda"):
    raise SystemExit(f"DEQFUSE_BUILD: expected auto, python, cpu or cuda, got {SWITCH!r}")
# A compiler that is newer than ours may warn. Whoever installs deqfuse in a CI of their own, with
# "auto", must not lose the extension over it.
STRICT = SWITCH in ("cpu", "cuda") and os.environ.get("CI") == "true"
DEBUG = os.environ.get("DEQFUSE_DEBUG_BUILD") == "1"


def packages_under(folder: str, package: str) -> dict[str, str]:
    """Name and directory of `folder`, called `package`, and of each package in it."""
    inner = setuptools.find_packages(folder)
    return {package: folder} | {
        f"{package}.{name}": f"{folder}/{name.replace('.', '/')}" for name in inner
    }


def without_extension(reason: object) -> None:
    """Say that the compiled backend is left out, or stop if it was asked for."""
    if SWITCH in ("cpu", "cuda"):
        raise SystemExit(f"deqfuse: cannot build the compiled CPU backend: {reason}")
    if not {"egg_info", "dist_info"} & set(sys.argv):  # pip runs setup.py for metadata, too
        print(f"deqfuse: installing without the compiled CPU backend: {reason}", file=sys.stderr)


def cuda_build() -> ModuleType:
    """csrc/cuda/build.py, which tests use, too."""
    spec = importlib.util.spec_from_file_location("cuda_build", "csrc/cuda/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def build_cuda(has_cuda: bool, target: Path, compiler: list[str]) -> None:
    """deqfuse/_cuda.so below `target`, where wanted. What lies there may be of older sources."""
    library = target / "deqfuse" / "_cuda.so"
    library.unlink(missing_ok=True)
    if SWITCH == "cpu" or (SWITCH == "auto" and not has_cuda):
        return
    cuda = cuda_build()
    try:
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or cuda.default_archs()
        built = cuda.build_library(archs, Path("build/cuda"), compiler, STRICT)
    except Exception as error:
        if SWITCH == "cuda":
            raise SystemExit(f"deqfuse: cannot build the CUDA library: {error}") from error
        print(f"deqfuse: installing without the CUDA library: {error}", file=sys.stderr)
        return
    library.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(built, library)


def extension() -> dict[str, object]:
    """Arguments of `setup` for the extension; empty where it cannot be built."""
    if SWITCH == "python":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:
        without_extension(f"{error}; install torch, then: pip install --no-build-isolation .")
        return {}
    if torch.__version__ < "2.11":  # a TorchVersion: compared by number
        without_extension(f"it needs torch 2.11 or later, found {torch.__version__}")
        return {}
    try:
        cxx = shlex.split(cpp_extension.get_cxx_compiler())
        command = [*cxx, "--version"]
        version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        without_extension(f"no C++ compiler ({error}); install GCC or Clang, or name one in CXX")
        return {}

    class Build(cpp_extension.BuildExtension):
        """As torch's, but under "auto" a failure leaves the extension out."""

        def run(self) -> None:
            in_place = vars(self)["inplace"]  # super().run() clears it
            try:
                super().run()
            except Exception as error:
                without_extension(f"{error}; the compiler's messages are above")
                # No module of an earlier build may be taken for this one's.
                for folder in (Path(self.build_lib), *([Path(".")] if in_place else [])):
                    (folder / "deqfuse" / "_cpu.so").unlink(missing_ok=True)
                self.extensions: list[setuptools.Extension] = []
                return
            build_cuda(
                torch.version.cuda is not None, Path("." if in_place else self.build_lib), cxx
            )

    compiler = "".join(c for c in version.partition("\n")[0] if c.isalnum() or c in " .-_+")
    # No API of Python's, and torch's stable one only: a wheel serves all versions of both. The name
    # that setuptools has for that is Python's limited API.
    module = cpp_extension.CppExtension(
        "deqfuse._cpu",
        sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
        depends=sorted(str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".inc")),
        py_limited_api=True,
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020b000000000000"),  # the stable ABI as of torch 2.11
            ("DEQFUSE_COMPILER", f'"{compiler}"'),
        ],
        extra_compile_args=[
            # Python's own flags ask for -g, which makes the build 1.5 times as long.
            *(("-O1", "-g") if DEBUG else ("-O3", "-g0")),
            *("-std=c++17", "-fvisibility=hidden"),
            # Fused multiply-adds are written out, so that every tile width and every instantiation
            # rounds alike. Square roots become instructions when they need not set errno.
            *("-ffp-contract=off", "-fno-math-errno"),
            # Vectors are passed between inlined functions only: their ABI does not matter.
            *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"),
            *(("-Werror",) if STRICT else ()),
        ],
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# The kernels sit at the top level, beside csrc/, but install below deqfuse: a top-level
# `triton_kernels` is another project's package.
package_dir = packages_under("deqfuse", "deqfuse")
package_dir |= packages_under("triton_kernels", "deqfuse.triton_kernels")

setuptools.setup(
    packages=list(package_dir),
    package_dir=package_dir,
    py_modules=["deqfuse_command"],
    **extension(),
)
