"""What an experiment is, and the outcome of its gradient check; ``runner.py`` carries it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deqfuse.cli.models import FUSIONS
from deqfuse.cli.output import OutputFolder
from deqfuse.cli.training import Recipe
from deqfuse.data import Splits

__all__ = ["FILES", "Experiment", "GradientCheck", "what_is_compared"]

FILES = ("index.html", "results.json", "convergence.png", "robustness.png", "training.png")
GRADIENT_ROWS = 4
GRADIENT_LIMIT = 1e-8


@dataclass(frozen=True)
class Experiment:
    """What is compared, on what, and where the report goes."""

    title: str
    about_data: str
    splits: Splits  # standardised
    recipe: Recipe
    seeds: int
    out: OutputFolder
    device: torch.device
    threads: int
    command: str
    metrics: tuple[str, ...] | None = None  # columns of the table; all that there are when None


@dataclass(frozen=True)
class GradientCheck:
    """The trained layer's gradients against dense implicit ones."""

    worst: float
    where: str
    count: int

    @property
    def passed(self) -> bool:
        """False also when the difference is NaN."""
        return self.worst <= GRADIENT_LIMIT

    @property
    def text(self) -> str:
        """One sentence with the number."""
        if not self.count:
            return f"The gradients of the trained layer could NOT be checked: {self.where}."
        verdict = "as it should be" if self.passed else f"MORE than the {GRADIENT_LIMIT:g} allowed"
        return (
            "Gradients of the trained layer against dense implicit gradients (float64, "
            f"{GRADIENT_ROWS} test rows, {self.count} parameters and inputs): worst relative "
            f"difference {self.worst:.1e} ({self.where}), {verdict}."
        )


def what_is_compared(experiment: Experiment) -> str:
    """The terms of the comparison, in a few sentences."""
    recipe = experiment.recipe
    seeds = f"{experiment.seeds} seed{'s' if experiment.seeds > 1 else ''}"
    return (
        f"{len(FUSIONS)} fusions with the same encoders, head and recipe ({recipe.epochs} epochs, "
        f"AdamW, batches of {recipe.batch_size}), {seeds} each. The epoch is "
        "chosen on the validation rows; test rows are used for the final numbers only. DEQ Fusion "
        f"alone adds a Jacobian penalty (weight {recipe.jacobian_weight:g}) that keeps its solves "
        "convergent. Differences smaller than the spread over seeds mean nothing."
    )
