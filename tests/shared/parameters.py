"""Parameters away from their initial values: a term that is left out or misplaced is then seen.

torch starts norms at ones and zeros, and the layer its weights at one and its bias at zero.
"""

from __future__ import annotations

import torch
from torch import nn

from deqfuse import DEQFusion


@torch.no_grad()
def scatter_norms(module: nn.Module, last_norm: float = 0.1) -> None:
    """All norms of a module, which may be a layer.

    ``last_norm`` scales the norm after the skip of a layer's released cells: a small one makes the
    equilibrium unique. At 0.3, which shows more of the skip's gradient, some rows have several.
    """
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.weight.uniform_(0.6, 1.4)
            part.bias.uniform_(-0.3, 0.3)
    if isinstance(module, DEQFusion) and module.variant != "paper":
        for cell in module.cells:
            cell.norm3.weight.mul_(last_norm)


@torch.no_grad()
def scatter_injection(layer: DEQFusion) -> None:
    """The weights and the bias of a layer's injections, where it has them."""
    if layer.modality_weights is not None:
        layer.modality_weights.uniform_(0.5, 1.5)
    if layer.injection_bias is not None:
        layer.injection_bias.fill_(0.3)
