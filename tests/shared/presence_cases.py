"""A layer whose rows lack modalities, and the layers made of what is present alone."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from parameters import scatter_injection, scatter_norms
from torch import Tensor

from deqfuse import DEQFusion

DIM, N, EACH = 12, 4, 3  # rows of each pattern
PATTERNS = [
    kept for n in range(1, N + 1) for kept in itertools.combinations(range(N), n)
]  # which modalities are present; the last has all


def layer_of(**options: Any) -> DEQFusion:
    torch.manual_seed(0)
    layer = DEQFusion(DIM, N, **{"num_groups": 2, **copy.deepcopy(options)}).double()
    scatter_norms(layer)
    scatter_injection(layer)
    return layer


def sub_layer(layer: DEQFusion, kept: tuple[int, ...], **options: Any) -> DEQFusion:
    """The layer of some modalities, with copies of its parameters."""
    if "cells" in options:
        options["cells"] = [copy.deepcopy(options["cells"][i]) for i in kept]
    sub = DEQFusion(DIM, len(kept), **{"num_groups": 2, **options}).to(next(layer.parameters()))
    state = {}
    for name, value in layer.state_dict().items():
        head, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if head == "modality_weights":
            value = value[list(kept)]
        elif head in ("cells", "projections"):
            if int(number) not in kept:
                continue
            name = f"{head}.{kept.index(int(number))}.{rest.partition('.')[2]}"
        state[name] = value
    sub.load_state_dict(state)
    return sub.train(layer.training)


def add_gradients(
    total: dict[str, Tensor], layer: DEQFusion, sub: DEQFusion, kept: tuple[int, ...]
) -> None:
    """Adds a sub-layer's gradients to those of the layer's parameters, by name."""
    for name, parameter in sub.named_parameters():
        grad = parameter.grad
        if grad is None:
            continue
        head, _, rest = name.partition(".")
        if head == "modality_weights":
            total[name][list(kept)] += grad
            continue
        if head in ("cells", "projections"):
            number, _, part = rest.partition(".")
            name = f"{head}.{kept[int(number)]}.{part}"
        total[name] += grad


def present_rows() -> Tensor:
    """(B, N) bool: EACH rows of every pattern, in a mixed order."""
    rows = torch.zeros(len(PATTERNS) * EACH, N, dtype=torch.bool)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    for k, row in enumerate(order.tolist()):
        rows[row, list(PATTERNS[k // EACH])] = True
    return rows


def rows_with(present: Tensor, kept: tuple[int, ...]) -> Tensor:
    """(R,) the rows that have exactly these modalities."""
    wanted = torch.zeros(N, dtype=torch.bool)
    wanted[list(kept)] = True
    return torch.nonzero((present == wanted).all(1)).flatten()


def poisoned(xs: list[Tensor], present: Tensor) -> list[Tensor]:
    """Leaves in which everything absent is NaN."""
    out = [x.detach().clone() for x in xs]
    for i, x in enumerate(out):
        x[~present[:, i]] = torch.nan
    return [x.requires_grad_() for x in out]
