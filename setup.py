"""Build only: which folder becomes which package, and the C++ extension. Metadata: pyproject.toml.

DEQFUSE_BUILD decides about the extension: "auto" (default) builds it where torch, pybind11 and a
C++ compiler are there and installs without it where it cannot, saying why; "cpu" makes that an
error; "python" leaves it out. csrc/README.md lists all switches.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import setuptools

# An older setuptools stops at the licence field with a message that does not name the cause.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"deqfuse needs setuptools >= 77.0.3 to be built, found {setuptools.__version__}; "
        "run: python -m pip install -U setuptools"
    )

SWITCH = os.environ.get("DEQFUSE_BUILD", "auto")
if SWITCH not in ("auto", "python", "cpu"):
    raise SystemExit(f"DEQFUSE_BUILD: expected auto, python or cpu, got {SWITCH!r}")
# A compiler that is newer than ours may warn. Whoever installs deqfuse in a CI of their own, with
# "auto", must not lose the extension over it.
STRICT = SWITCH == "cpu" and os.environ.get("CI") == "true"
DEBUG = os.environ.get("DEQFUSE_DEBUG_BUILD") == "1"


def packages_under(folder: str, package: str) -> dict[str, str]:
    """Name and directory of `folder`, called `package`, and of each package in it."""
    inner = setuptools.find_packages(folder)
    return {package: folder} | {
        f"{package}.{name}": f"{folder}/{name.replace('.', '/')}" for name in inner
    }


def without_extension(reason: object) -> None:
    """Say that the compiled backend is left out, or stop if it was asked for."""
    if SWITCH == "cpu":
        raise SystemExit(f"deqfuse: cannot build the compiled CPU backend: {reason}")
    if not {"egg_info", "dist_info"} & set(sys.argv):  # pip runs setup.py for metadata, too
        print(f"deqfuse: installing without the compiled CPU backend: {reason}", file=sys.stderr)


def extension() -> dict[str, object]:
    """Arguments of `setup` for the extension; empty where it cannot be built."""
    if SWITCH == "python":
        return {}
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:
        without_extension(
            f"{error}; install torch and pybind11, then: pip install --no-build-isolation ."
        )
        return {}
    if torch.__version__ < "2.11":  # a TorchVersion: compared by number
        without_extension(f"it needs torch 2.11 or later, found {torch.__version__}")
        return {}
    try:
        command = [*shlex.split(cpp_extension.get_cxx_compiler()), "--version"]
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
                stale = [*Path(self.build_lib).glob("deqfuse/_C*")]
                stale += Path("deqfuse").glob("_C*") if in_place else []
                for path in stale:
                    path.unlink()
                self.extensions: list[setuptools.Extension] = []

    compiler = "".join(c for c in version.partition("\n")[0] if c.isalnum() or c in " .-_+")
    module = cpp_extension.CppExtension(
        "deqfuse._C",
        # csrc/cuda/host_*.cpp: the CUDA kernels' bodies on the CPU, for tests.
        sorted(map(str, [*Path("csrc/cpu").glob("*.cpp"), *Path("csrc/cuda").glob("host_*.cpp")])),
        depends=sorted(map(str, Path("csrc").rglob("*.*"))),
        include_dirs=[pybind11.get_include()],
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
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


# The kernels sit at the top level, beside csrc/, but install below deqfuse: a top-level
# `triton_kernels` is another project's package.
package_dir = packages_under("deqfuse", "deqfuse")
package_dir |= packages_under("triton_kernels", "deqfuse.triton_kernels")

setuptools.setup(packages=list(package_dir), package_dir=package_dir, **extension())
