"""float32 numbers rounded as hardware rounds what it multiplies."""

from __future__ import annotations

import torch
from torch import Tensor


def tf32(t: Tensor) -> Tensor:
    """The leading 10 of 23 bits, cut off as tensor cores do with what they are given."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)


def bf16(t: Tensor) -> Tensor:
    return t.bfloat16().float()
