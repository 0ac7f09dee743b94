"""Train one model, choose its epoch on validation rows, measure it on test rows."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from deqfuse import ConvergenceWarning, SolveInfo
from deqfuse.cli.metrics import accuracy, evaluate_metrics
from deqfuse.cli.models import FusionClassifier, FusionKind
from deqfuse.data import MultiviewData, Splits

__all__ = ["Recipe", "Run", "SolveStatistics", "count_convergence_warnings", "train_one"]


@dataclass(frozen=True)
class Recipe:
    """The same for every fusion of a comparison; the penalty concerns equilibria only.

    Without the penalty Adam drives the trained maps to spectral radius 1 within 50 steps: some rows
    stop converging, their gradients are large and wrong, and the loss jumps. With it every row
    converges, in fewer evaluations, so that it even saves time.
    """

    epochs: int = 60
    batch_size: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    jacobian_weight: float = 20.0  # of SolveInfo.jacobian_penalty in the loss


@dataclass(frozen=True)
class SolveStatistics:
    """How the equilibrium solves of a set of rows went."""

    converged: float  # share of rows whose every block converged
    fuse_nfe: tuple[float, int]  # evaluations per row: median and maximum
    cells_nfe: tuple[float, int]

    @classmethod
    def of(cls, infos: Sequence[SolveInfo]) -> SolveStatistics:
        """Summary over the rows of one or more solves."""
        fuse = torch.cat([info.fuse.nfe.flatten() for info in infos])
        cells = torch.cat([info.cells.nfe.flatten() for info in infos if info.cells is not None])
        converged = torch.cat([info.converged.flatten() for info in infos])

        def spread(nfe: Tensor) -> tuple[float, int]:
            return nfe.double().quantile(0.5).item(), int(nfe.max().item())

        return cls(converged.double().mean().item(), spread(fuse), spread(cells))


@dataclass
class Run:
    """One model trained with one seed."""

    kind: FusionKind
    seed: int
    model: FusionClassifier  # holding the parameters of the chosen epoch
    chosen_epoch: int = 0  # counted from 1
    validation: list[float] = field(default_factory=list)  # accuracy after each epoch
    train_loss: list[float] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)  # training only
    metrics: dict[str, float] = field(default_factory=dict)  # on the test rows
    solve: SolveStatistics | None = None  # on the test rows
    train_converged: float | None = None  # share of rows, over all training steps
    num_warnings: int = 0  # ConvergenceWarning, forward and backward, while training
    first_warning: str = ""

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of the whole model."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def seconds_per_epoch(self) -> float:
        """Median wall time of a training epoch."""
        return median(self.epoch_seconds)


@contextlib.contextmanager
def count_convergence_warnings() -> Iterator[list[str]]:
    """Collect the messages of ``ConvergenceWarning`` instead of printing each; pass others on."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        yield messages
    for item in caught:
        if issubclass(item.category, ConvergenceWarning):
            messages.append(str(item.message))
        else:
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)


def train_one(
    kind: FusionKind,
    seed: int,
    splits: Splits,
    recipe: Recipe,
    on_epoch: Callable[[int, float], None] = lambda epoch, validation: None,
) -> Run:
    """Train one model; keep the epoch of best validation accuracy, the loss deciding ties.

    Args:
        kind: which fusion.
        seed: of the initial values, the order of the rows and dropout.
        splits: standardised data, on the device to train on.
        recipe: epochs and optimiser.
        on_epoch: called after every epoch with its number (from 1) and its validation accuracy.
    """
    device = splits.train.labels.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # the caller's random state is not ours to change
        torch.manual_seed(seed)
        model = FusionClassifier(kind, splits.train.widths, splits.train.num_classes).to(device)
        run = Run(kind, seed, model)
        with count_convergence_warnings() as messages:
            _fit(run, splits, recipe, on_epoch)
        run.num_warnings = len(messages)
        run.first_warning = messages[0] if messages else ""
    with count_convergence_warnings():  # the share of converged rows says it
        logits, info = predict(model, splits.test)
    run.metrics = evaluate_metrics(logits, splits.test.labels)
    run.solve = SolveStatistics.of([info]) if info is not None else None
    return run


def predict(model: FusionClassifier, data: MultiviewData) -> tuple[Tensor, SolveInfo | None]:
    """Logits (rows, classes) in evaluation mode, without gradient, and the record of the solve."""
    model.eval()
    with torch.no_grad():
        return model.forward_with_info(data.views)


def _fit(run: Run, splits: Splits, recipe: Recipe, on_epoch: Callable[[int, float], None]) -> None:
    model = run.model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    order = torch.Generator().manual_seed(run.seed)  # own stream: same batches for every fusion
    best = (-1.0, float("-inf"))
    best_state = copy.deepcopy(model.state_dict())
    converged: list[Tensor] = []
    for epoch in range(1, recipe.epochs + 1):
        started = time.perf_counter()
        run.train_loss.append(
            _train_epoch(model, splits.train, optimizer, recipe, order, converged)
        )
        schedule.step()
        run.epoch_seconds.append(time.perf_counter() - started)

        logits, _ = predict(model, splits.validation)
        labels = splits.validation.labels
        score = accuracy(logits.argmax(1), labels)
        loss = nn.functional.cross_entropy(logits, labels).item()
        run.validation.append(score)
        if (score, -loss) > best:
            best, best_state = (score, -loss), copy.deepcopy(model.state_dict())
            run.chosen_epoch = epoch
        on_epoch(epoch, score)
    model.load_state_dict(best_state)
    if converged:
        run.train_converged = torch.cat(converged).double().mean().item()


def _train_epoch(
    model: FusionClassifier,
    data: MultiviewData,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    order: torch.Generator,
    converged: list[Tensor],
) -> float:
    """One pass over the rows in a new order; returns the mean cross-entropy."""
    model.train()
    shuffled = torch.randperm(data.num_rows, generator=order).to(data.labels.device)
    total = torch.zeros((), device=data.labels.device)
    for index in shuffled.split(recipe.batch_size):
        batch = data.rows(index)
        optimizer.zero_grad(set_to_none=True)
        logits, info = model.forward_with_info(batch.views)
        loss = nn.functional.cross_entropy(logits, batch.labels)
        total += loss.detach() * len(index)
        if info is not None:
            converged.append(info.converged.flatten())
            loss = loss + recipe.jacobian_weight * info.jacobian_penalty()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
    return total.item() / data.num_rows
