"""Derivatives of a map that one backward pass does not give: J v, and what is differentiated twice.

Fused kernels (flash attention, the fast path of ``nn.MultiheadAttention``, oneDNN's LSTM) have a
backward pass and no more. Such evaluations run on the plain kernels, which have all derivatives.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

Map = Callable[[Tensor], Tensor]
Linearize = Callable[[Tensor], Map]  # z -> (v -> J(z) v)
Jacobian = Callable[[Tensor, list[int]], Tensor]  # z (R, n), rows -> their Jacobians (rows, n, n)

MAX_FEATURES = 1024  # of a row whose dense Jacobian is made of as many products
NUMBERS_AT_ONCE = 2**24  # of dense Jacobians, kept at a time

_lock = threading.Lock()
_inside: list[contextlib.ExitStack] = []  # one for each block that is in; the first holds switches


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Attention and LSTMs as torch composes them of products, slower and differentiable.

    The switches belong to the whole process. Threads share them: the first one in sets them, the
    last one out sets them back, since threads that each restored what they had found could leave
    them off for good.
    """
    with _lock:
        _inside.append(_switches() if not _inside else contextlib.ExitStack())
    try:
        yield
    finally:
        with _lock:
            held = _inside[0]
            _inside.pop()
            if not _inside:
                held.close()


def _switches() -> contextlib.ExitStack:
    """Sets torch's switches; what is returned sets them back when it is closed."""
    onednn: Any = torch.backends.mkldnn
    stack = contextlib.ExitStack()
    stack.callback(setattr, onednn, "enabled", onednn.enabled)
    stack.callback(
        torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
    )
    onednn.enabled = False  # its flags() would also set TF32, and warn of it
    torch.backends.mha.set_fastpath_enabled(False)
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


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


def columns_of(linearize: Linearize) -> Jacobian:
    """Dense Jacobians of some rows, from products of all rows: one for each number of a row.

    Args:
        linearize: ``z -> (v -> J(z) v)``; with ``J^T`` instead, the result is that, too.
    """

    def jacobian(z: Tensor, rows: list[int]) -> Tensor:
        product = linearize(z)
        unit = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        return torch.stack([product(e.expand_as(z))[rows] for e in unit], dim=2)

    return jacobian


def rows_at_once(rows: list[int], n: int) -> Iterator[list[int]]:
    """The rows in parts whose dense Jacobians, n x n each, fit into some memory."""
    size = max(1, NUMBERS_AT_ONCE // max(1, n * n))
    return (rows[first : first + size] for first in range(0, len(rows), size))
