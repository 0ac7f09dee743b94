"""DEQFusion and ProFusion as fusion modules of MultiBench (https://github.com/pliang279/MultiBench).

Run it with a MultiBench checkout on the path, e.g. ``PYTHONPATH=MultiBench python
examples/multibench.py``. The data here are random; take a ``get_dataloader`` of MultiBench's
``datasets`` for real ones: batches are lists ``[x_1, ..., x_N, labels]``.

MultiBench calls ``fusion(list of N encodings)``, takes the first entry where that returns a tuple,
and saves the whole model with ``torch.save``. Nothing has to be patched for either module. That is
MultiBench's current master; older versions call ``fusion(list, training=...)``, which is not
supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from deqfuse import Anderson, DEQFusion, ProFusion
from deqfuse.nn import WithInfo

WIDTHS, DIM, CLASSES = (20, 12), 64, 3
JACOBIAN_WEIGHT = 20.0


def deq_fusion() -> tuple[list[nn.Module], nn.Module]:
    """Encoders and their deep-equilibrium fusion; the tuple's info is for the objective."""
    encoders: list[nn.Module] = [nn.Sequential(nn.Linear(w, DIM), nn.ReLU()) for w in WIDTHS]
    return encoders, WithInfo(DEQFusion(DIM, num_modalities=len(WIDTHS)))


def pro_fusion(**how: Any) -> tuple[list[nn.Module], nn.Module]:
    """Progressive fusion feeds back into the encoders, so they move inside: MultiBench's are empty.

    Args:
        how: ``steps=3`` for the recurrence (its Jacobian penalty is 0: there is no equilibrium),
            ``solver=Anderson()`` for its equilibrium.
    """
    encoders = [nn.Sequential(nn.Linear(w, DIM), nn.ReLU()) for w in WIDTHS]
    late = DEQFusion(DIM, num_modalities=len(WIDTHS), combine="weighted_sum")
    passing: list[nn.Module] = [nn.Identity() for _ in WIDTHS]
    return passing, WithInfo(ProFusion(encoders, late, context_dim=DIM, **how))


def objective(prediction: Tensor, truth: Tensor, args: Mapping[str, Any]) -> Tensor:
    """Cross-entropy, and in training the Jacobian penalty of the solve behind this prediction.

    MultiBench puts the fusion module's whole output under "fused" before it calls this.
    """
    loss = nn.functional.cross_entropy(prediction, truth.long().to(prediction.device))
    if args["training"]:
        _, info = args["fused"]
        loss = loss + JACOBIAN_WEIGHT * info.jacobian_penalty()
    return loss


class Random(Dataset[tuple[Tensor, ...]]):
    """Two views of a label, with noise."""

    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(CLASSES, (rows,), generator=generator)
        self.views = [torch.randn(rows, w, generator=generator) for w in WIDTHS]
        for view in self.views:
            view[:, :CLASSES] += 2 * nn.functional.one_hot(self.labels, CLASSES)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return (*(view[i] for view in self.views), self.labels[i])


def main() -> None:
    """Train both with MultiBench's own loop."""
    from training_structures.Supervised_Learning import train  # type: ignore[import-not-found]

    loaders = [DataLoader(Random(rows, seed), batch_size=32) for seed, rows in ((0, 256), (1, 64))]
    fusions = {
        "deq": deq_fusion(),
        "pro": pro_fusion(steps=3),
        "pro_equilibrium": pro_fusion(solver=Anderson()),
    }
    for name, (encoders, fusion) in fusions.items():
        train(
            encoders,
            fusion,
            nn.Linear(DIM, CLASSES),
            *loaders,
            5,
            objective=objective,
            objective_args_dict={},
            optimtype=torch.optim.AdamW,
            lr=1e-3,
            save=f"{name}.pt",
            track_complexity=False,
        )


if __name__ == "__main__":
    main()
