"""A trained layer as an ONNX file: ``pip install onnx onnxscript onnxruntime``, then run this file.

ONNX has no operator for "iterate until each row has converged", so the layer itself is refused. Its
weights also fit a layer that applies its equations a fixed number of times, and where they contract
(the penalty in training sees to that) some sixteen steps are at the equilibrium. That layer is
plain matrix products and norms. How far it is off is measured before anything is written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from deqfuse import Anderson, DEQFusion

STEPS, WIDTHS, DIM = 16, (20, 12), 64


class Named(nn.Module):
    """The layer with an argument per modality, as an exported program has it."""

    def __init__(self, fusion: DEQFusion) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.fusion([first, second])


def unrolled(trained: DEQFusion, steps: int = STEPS) -> DEQFusion:
    """The same weights and equations, applied ``steps`` times from zero."""
    layer = DEQFusion(
        trained.dim, trained.num_modalities, num_groups=trained.num_groups, in_dims=WIDTHS,
        variant=trained.variant, injection_norm=trained.injection_norm, weight_tied_steps=steps,
    )  # fmt: skip
    layer.load_state_dict(trained.state_dict())
    return layer.eval()


def export(trained: DEQFusion, samples: Sequence[Tensor], path: Path, limit: float = 1e-3) -> float:
    """Write the file; returns the largest relative error of a row of the samples.

    Raises:
        ValueError: a row is further from its equilibrium than the limit: more steps, or a layer
            that contracts more.
    """
    layer = unrolled(trained)
    with torch.no_grad():
        want, got = trained(samples), layer(samples)
    error = float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
    if not error <= limit:
        raise ValueError(f"{STEPS} steps are off by {error:.1e} of a row, more than {limit:.0e}")
    rows = torch.export.Dim("rows", min=2, max=65536)
    program = torch.onnx.export(
        Named(layer).eval(), tuple(samples), dynamo=True, dynamic_shapes=({0: rows}, {0: rows})
    )
    assert program is not None  # it is None with dynamo=False only
    program.save(path)
    return error


if __name__ == "__main__":
    torch.manual_seed(0)
    fusion = DEQFusion(DIM, len(WIDTHS), in_dims=WIDTHS, solver=Anderson(tol=1e-6))
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "fusion.onnx")
    print(f"{target}: off by {export(fusion, [torch.randn(8, w) for w in WIDTHS], target):.1e}")
