"""What the tests of refusals share."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from deqfuse import (
    DEQFusion,
)

DIM, ROWS, N = 8, 3, 2


def fusion(**options: Any) -> DEQFusion:
    return DEQFusion(DIM, N, **{"num_groups": 2, "on_failure": "ignore", **options})


def features(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [torch.ones(ROWS, DIM, dtype=dtype, device=device) for _ in range(N)]


def refused(error: type[Exception], *parts: str) -> Any:
    """pytest.raises for a message that contains all parts in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(p) for p in parts))
