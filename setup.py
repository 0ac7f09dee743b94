"""Build only: which folder becomes which package. Metadata lives in pyproject.toml."""

import setuptools

# An older setuptools stops at the licence field with a message that does not name the cause.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"deqfuse needs setuptools >= 77.0.3 to be built, found {setuptools.__version__}; "
        "run: python -m pip install -U setuptools"
    )


def packages_under(folder: str, package: str) -> dict[str, str]:
    """Name and directory of `folder`, called `package`, and of each package in it."""
    inner = setuptools.find_packages(folder)
    return {package: folder} | {
        f"{package}.{name}": f"{folder}/{name.replace('.', '/')}" for name in inner
    }


# The kernels sit at the top level, beside csrc/, but install below deqfuse: a top-level
# `triton_kernels` is another project's package.
package_dir = packages_under("deqfuse", "deqfuse")
package_dir |= packages_under("triton_kernels", "deqfuse.triton_kernels")

setuptools.setup(packages=list(package_dir), package_dir=package_dir)
