"""Derivatives of a map that one backward pass does not give: J v, and what is differentiated twice.

Fused kernels (flash attention, the fast path of ``nn.MultiheadAttention``, oneDNN's LSTM) have a
backward pass and no more. Such evaluations run on the plain kernels, which have all derivatives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

Map = Callable[[Tensor], Tensor]
Linearize = Callable[[Tensor], Map]  # z -> (v -> J(z) v)


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Attention and LSTMs as torch composes them of products, slower and differentiable."""
    onednn: Any = torch.backends.mkldnn
    fast, fused = torch.backends.mha.get_fastpath_enabled(), onednn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    onednn.enabled = False  # its flags() would also set TF32, and warn of it
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        onednn.enabled = fused


def jvp_of(f: Map) -> Linearize:
    """JVPs of any ``f`` by forward-mode differentiation.

    On dual tensors rather than by ``torch.func.jvp``, under which batch norm could not write its
    running statistics.
    """

    def linearize(z: Tensor) -> Map:
        def jvp(v: Tensor) -> Tensor:
            with plain_kernels(), forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(z, v))).tangent
            return torch.zeros_like(v) if tangent is None else tangent

        return jvp

    return linearize
