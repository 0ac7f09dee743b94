"""Whether Triton's interpreter, which runs kernels without a GPU, works here."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

import pytest


def _numbers(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


def _reason() -> str:
    if not importlib.util.find_spec("triton"):
        return ""  # said by other tests
    if _numbers("triton") < (3, 7) and _numbers("numpy") >= (2, 4):
        return "Triton 3.6's interpreter takes no NumPy from 2.4 on: pip install 'numpy<2.4'"
    return ""


needs_interpreter = pytest.mark.skipif(bool(_reason()), reason=_reason())
