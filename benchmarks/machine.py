"""What a number depends on: processor, threads, versions, and how fast this machine multiplies."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from typing import Any

import torch

import deqfuse
from benchmarks import cases
from deqfuse.backends import cpu_native


def describe(rates: Sequence[tuple[dict[str, float], float]]) -> dict[str, Any]:
    """Facts saved with every run.

    Args:
        rates: (matmul rates by name, bandwidth) of each time they were measured in this run.
    """
    build = cpu_native.module.build_info() if cpu_native.module is not None else {}
    matmul: dict[str, float] = {}
    for measured, _ in rates:
        for name, rate in measured.items():
            matmul[name] = max(rate, matmul.get(name, 0.0))
    gpu = torch.cuda.get_device_name() if cases.DEVICE == "cuda" else None
    return {
        "threads": torch.get_num_threads(),
        "products": _products(),
        "gpu": gpu,
        "versions": {
            "deqfuse": deqfuse.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **_version("torchdeq"),
            **(_version("triton") if cases.DEVICE == "cuda" else {}),
        },
        "instruction_set": build.get("instruction_set", "none: the compiled module is missing"),
        "compiler": build.get("compiler", ""),
        "matmul_rates": matmul,
        "bandwidth": max((b for _, b in rates), default=0.0),
    }


def _products() -> str:
    """Of float32 matrices, for every variant: on a GPU torch's switch decides."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "TF32" if cases.DEVICE == "cuda" and tf32 else "float32"


def _version(package: str) -> dict[str, str]:
    from importlib import metadata

    try:
        return {package: metadata.version(package)}
    except metadata.PackageNotFoundError:
        return {}


def slug(machine_info: dict[str, Any]) -> str:
    """A folder name: processor (or GPU), threads, and the products' arithmetic if it is TF32."""
    own = machine_info["deqfuse"]
    name = own["gpu"] or machine_info["cpu"]["brand_raw"] or machine_info["machine"]
    name = re.sub(r"\((r|tm)\)", "", name.lower())
    tf32 = " tf32" if own.get("products") == "TF32" else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {own['threads']} threads{tf32}").strip("-")
