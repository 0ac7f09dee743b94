"""Test files that import :func:`every_device` run all their tests on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def every_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """New tensors and modules lie on it; ``torch.get_default_device()`` tells."""
    torch.set_default_device(request.param)
    yield
    torch.set_default_device(None)


def own_backend(name: str) -> str:
    """The backend that "compiled" stands for on the device."""
    return torch.get_default_device().type if name == "compiled" else name
