"""``python -m deqfuse.info``: what is installed, what the machine has, which backends can run."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

__all__ = ["main", "system_report"]

# Environment variables that change what deqfuse does, and what they mean when unset.
_SWITCHES = {
    "DEQFUSE_BACKEND": "auto",
    "DEQFUSE_ISA": "the widest instruction set that the processor has",
}


def system_report() -> str:
    """Versions, devices, switches and backends as text for a terminal or a bug report.

    Asks CUDA for its devices, which initialises it in this process.
    """
    sections = {
        "versions": _versions(),
        "machine": _machine(),
        "CUDA devices": _cuda_devices(),
        "environment": {
            name: os.environ.get(name) or f"not set ({default})"
            for name, default in _SWITCHES.items()
        },
        "backends": _backends(),
    }
    lines = []
    for title, entries in sections.items():
        width = max(map(len, entries)) + 1
        lines.append(f"{title}:")
        for name, text in entries.items():
            text = text.replace("\n", "\n" + " " * (width + 3))
            lines.append(f"  {name + ':':<{width}} {text}")
    return "\n".join(lines)


def main() -> None:
    """Print the report."""
    print(system_report())


def _versions() -> dict[str, str]:
    import torch

    import deqfuse

    return {
        "deqfuse": f"{deqfuse.__version__} ({Path(deqfuse.__file__).parent})",
        "Python": f"{platform.python_version()} ({sys.executable})",
        "torch": f"{torch.__version__} ({_torch_build()})",
        "triton": _triton(),
        "numpy": _numpy(),
    }


def _torch_build() -> str:
    import torch

    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return "CPU only"


def _triton() -> str:
    try:
        import triton
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "not installed; CUDA builds of torch bring it, or: pip install 'deqfuse[triton]'"
        return f"installed, but it cannot be imported: {error}"
    except Exception as error:  # the report has to come out whatever a broken install raises
        return f"installed, but it cannot be imported: {error}"
    return str(triton.__version__)


def _numpy() -> str:
    try:
        import numpy
    except ImportError as error:
        remedy = "deqfuse.data and the command line need it: pip install 'deqfuse[cli]'"
        return f"cannot be imported ({error}); {remedy}"
    return numpy.__version__


def _machine() -> dict[str, str]:
    import torch

    return {
        "system": platform.platform(),
        "CPU": f"{_cpu_name()}, {_usable_cores()} cores for this process",
        "threads": f"{torch.get_num_threads()} for torch",
    }


def _cpu_name() -> str:
    try:  # platform.processor() is empty on most Linux systems
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # os.cpu_count() ignores the process's CPU mask
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cuda_devices() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        build = "this torch sees none" if torch.version.cuda else "this torch has no CUDA support"
        return {"none": build}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        f"cuda:{i}": f"{device.name}, compute capability {device.major}.{device.minor}, "
        f"{device.total_memory / 2**30:.0f} GiB"
        for i, device in enumerate(devices)
    }


def _backends() -> dict[str, str]:
    from deqfuse import backends

    entries = {}
    for backend in backends.describe():
        if not backend.available:
            text = f"unavailable\nReason: {backend.reason}\nRemedy: {backend.remedy}"
        else:
            text = f"available\n{backend.reason}"
            if backend.name == "cpu":
                text += _compiled_module()
        entries[backend.name] = text
    return entries


def _compiled_module() -> str:
    from deqfuse.backends import cpu_native

    if cpu_native.module is None:
        return ""
    build = cpu_native.module.build_info()
    return (
        f"\nRuns {build['instruction_set']} in vectors of {build['vector_bytes']} bytes; "
        f"built with {build['compiler']} for torch >= {build['torch_target']}"
    )


if __name__ == "__main__":
    main()
