"""What a layer's solve found, and what the layer returns of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqfuse.result import SolveInfo


class Found(NamedTuple):
    """A solve; what few callers ask for is made when they do."""

    z: Tensor  # (B, d), for the caller to keep
    cells: Callable[[], Tensor]  # (N, B, d)
    info: Callable[[], SolveInfo]

    def outputs(
        self, lead: torch.Size, dtype: torch.dtype, return_info: bool, return_cells: bool
    ) -> Any:
        """What a layer returns, for features of this dtype and these leading dimensions."""
        z = self.z if self.z.dtype is dtype else self.z.to(dtype)
        dim = z.shape[-1]
        # Not even a reshape that changes nothing: it is one more node of the graph.
        results: list[Any] = [z if len(lead) == 1 else z.reshape(*lead, dim)]
        if return_cells:  # a copy: the backward pass keeps the original
            cells = self.cells().to(dtype, copy=True)
            results.append(cells.reshape(len(cells), *lead, dim))
        if return_info:
            # First: a graph that breaks in it cannot keep a bound `append` (Dynamo of torch 2.11).
            info = self.info().reshape(*lead)
            results.append(info)
        return results[0] if len(results) == 1 else tuple(results)
