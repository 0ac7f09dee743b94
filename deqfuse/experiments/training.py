"""The training loop. It sees training and validation rows, nothing else.

The synthetic study alone has another one, which trains hundreds of small models side by side as one
batch (``synthetic.py``).
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from deqfuse import ConvergenceWarning, Outcome, SolveInfo
from deqfuse.data import MultiviewData
from deqfuse.experiments.tasks import CLASSES, LOSSES, Task

__all__ = [
    "Classifier",
    "History",
    "Recipe",
    "collect_warnings",
    "evaluate",
    "fit",
    "predict",
    "train_step",
]

CURVE_POINTS = 50  # of what is recorded through training
BEGINNING = 0.02  # of the steps: in the first ones of a training rows may not converge yet


class Classifier(Protocol):
    """A model that the loop can train."""

    def loss(self, batch: MultiviewData) -> tuple[Tensor, SolveInfo | None]:
        """Training loss without the Jacobian penalty, and how the solve went."""

    def logits(self, views: Sequence[Tensor]) -> tuple[Tensor, SolveInfo | None]:
        """Answers (B, outputs), and how the solve went; None where there is no equilibrium."""


@dataclass(frozen=True)
class Recipe:
    """How to train; the Jacobian penalty concerns equilibria only.

    Without the penalty Adam drives the trained maps to spectral radius 1 within 50 steps: some rows
    stop converging, their gradients are large and wrong, and the loss jumps. With it every row
    converges, in fewer evaluations, so that it even saves time.
    """

    epochs: int
    learning_rate: float
    weight_decay: float
    clip_norm: float
    batch_size: int | None = None  # all rows in every step when None
    optimizer: Literal["adam", "adamw"] = "adam"
    schedule: Literal["cosine", "step"] = "cosine"
    decay_every: int = 500  # of "step": epochs
    decay_factor: float = 0.2
    jacobian_weight: float = 20.0  # of SolveInfo.jacobian_penalty
    evaluate_every: int = 1  # epochs
    patience: int | None = None  # epochs without a better one after which training ends
    choose_by: Literal["accuracy", "cross_entropy", "macro_f1", "mae", "mse"] = "accuracy"

    def parameters(self, model: nn.Module) -> Any:
        """What the optimizer trains: parameters, or groups of them with rates of their own."""
        return model.parameters()

    def penalty(self, info: SolveInfo) -> Tensor | float:
        """What is added to the loss for the sake of convergence."""
        if self.jacobian_weight and info.blocks:
            return self.jacobian_weight * info.jacobian_penalty()
        return 0.0

    def rank(self, score: float, loss: float) -> tuple[float, float]:
        """How good answers on validation rows are, more is better.

        The one rule by which an epoch is chosen, and a training among several: by the score of the
        task, or by its loss where ``choose_by`` names one. The other of the two numbers decides
        ties. NaN compares with nothing: any finite answers are better.
        """
        if not math.isfinite(score):
            return -math.inf, -math.inf
        return (-loss, score) if self.choose_by in LOSSES else (score, -loss)


@dataclass
class History:
    """What happened in training; the model holds the parameters of the chosen epoch."""

    task: Task = CLASSES
    chosen_epoch: int = 0  # counted from 1
    epochs: int = 0  # that were trained
    rank: tuple[float, float] = (-math.inf, -math.inf)  # of the chosen epoch, see Recipe.rank
    validation: list[float] = field(default_factory=list)  # the task's score at every evaluation
    validation_loss: list[float] = field(default_factory=list)  # the task's loss, likewise
    train_loss: list[float] = field(default_factory=list)  # per epoch, without the penalty
    converged: list[Tensor] = field(default_factory=list)  # per step: which rows
    rescued: list[Tensor] = field(default_factory=list)  # per step: share of rows
    fuse_nfe: list[Tensor] = field(default_factory=list)  # per step: mean over rows
    step_seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)  # likewise, of the processor
    epoch_seconds: list[float] = field(default_factory=list)  # training only
    warnings: Sequence[str] = ()  # texts of ConvergenceWarning, forward and backward

    @property
    def rows_converged(self) -> float | None:
        """Share of rows over all training steps; None without an equilibrium."""
        if not self.converged:
            return None
        return torch.cat(self.converged).double().mean().item()

    def values(self) -> dict[str, Any]:
        """For the trial's record."""
        out: dict[str, Any] = {
            "chosen_epoch": self.chosen_epoch,
            "epochs": self.epochs,
            f"validation_{self.task.score}": max(
                filter(math.isfinite, self.validation), default=None
            ),
            f"validation_{self.task.loss}": min(
                filter(math.isfinite, self.validation_loss), default=None
            ),
            "step_ms": round(1000 * median(self.step_seconds), 3),
        }
        if self.converged:
            shares = torch.stack([rows.double().mean() for rows in self.converged])
            rescued = torch.stack(self.rescued)
            begin = min(math.ceil(BEGINNING * len(shares)), len(shares) - 1)
            settled = shares[begin:]
            out |= {
                "train_converged": shares.mean().item(),
                "train_converged_settled": settled.mean().item(),
                "train_converged_worst_step": settled.min().item(),
                "train_rescued": rescued.mean().item(),
                "train_left_settled": (1 - settled + rescued[begin:]).mean().item(),
                "train_converged_curve": _curve(shares),
                "train_fuse_nfe_curve": _curve(torch.stack(self.fuse_nfe).double()),
                "convergence_warnings": len(self.warnings),
            }
        return out


def fit(
    model: nn.Module,  # a Classifier
    train: MultiviewData,
    validation: MultiviewData | None,
    recipe: Recipe,
    seed: int,
    on_epoch: Callable[[int, float], None] = lambda epoch, validation: None,
    task: Task = CLASSES,
) -> History:
    """Train; keep the epoch that :meth:`Recipe.rank` calls the best on the validation rows.

    Args:
        model: a :class:`Classifier`, trained in place.
        train: rows to learn from.
        validation: rows to choose the epoch by; None keeps the last epoch.
        recipe: how to train.
        seed: of the order of the rows; dropout draws from torch's own generator.
        on_epoch: called after every look at the validation rows with the epoch's number (from 1)
            and its score (accuracy).
        task: what the model learns.
    """
    optimizer = _optimizer(model, recipe)
    schedule = _schedule(optimizer, recipe)
    order = torch.Generator().manual_seed(seed)  # its own stream: same batches for every model
    history = History(task)
    best_state = copy.deepcopy(model.state_dict())
    with collect_warnings(ConvergenceWarning) as messages:
        for epoch in range(1, recipe.epochs + 1):
            started = time.perf_counter()
            model.train()
            total = torch.zeros((), device=train.labels.device)
            for batch in _batches(train, recipe, order):
                total += train_step(model, batch, optimizer, recipe, history) * batch.num_rows
            schedule.step()
            history.train_loss.append(total.item() / train.num_rows)
            history.epoch_seconds.append(time.perf_counter() - started)
            history.epochs = epoch
            if epoch % recipe.evaluate_every and epoch != recipe.epochs:
                continue
            if validation is None:
                history.chosen_epoch = epoch
                continue
            answers, _ = predict(model, validation)
            score, loss = task.judge(answers, validation.labels)
            history.validation.append(score)
            history.validation_loss.append(loss)
            rank = recipe.rank(score, loss)
            if history.chosen_epoch == 0 or rank > history.rank:
                history.rank, best_state = rank, copy.deepcopy(model.state_dict())
                history.chosen_epoch = epoch
            on_epoch(epoch, score)
            if recipe.patience is not None and epoch - history.chosen_epoch >= recipe.patience:
                break
    history.warnings = messages
    if validation is not None:
        model.load_state_dict(best_state)
    return history


def train_step(
    model: nn.Module,
    batch: MultiviewData,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    history: History,
) -> Tensor:
    """One update of the parameters; returns the loss before it, without the penalty: ()."""
    started, processor = time.perf_counter(), time.process_time()
    optimizer.zero_grad(set_to_none=True)
    loss, info = model.loss(batch)  # type: ignore[operator]
    plain = loss.detach()
    if info is not None:
        history.converged.append(info.converged.flatten())
        history.rescued.append(info.rescued.double().mean())
        history.fuse_nfe.append(info.fuse.nfe.double().mean())
        loss = loss + recipe.penalty(info)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    history.step_seconds.append(time.perf_counter() - started)
    history.processor_seconds.append(time.process_time() - processor)
    return plain


def predict(model: nn.Module, data: MultiviewData) -> tuple[Tensor, SolveInfo | None]:
    """Answers (rows, outputs) in evaluation mode, without gradient."""
    model.eval()
    with torch.no_grad():
        answers, info = model.logits(data.views)  # type: ignore[operator]
    return answers, info


def evaluate(model: nn.Module, data: MultiviewData, task: Task = CLASSES) -> dict[str, Any]:
    """Metrics of a trained model on rows that it has not seen, and how their solves went.

    Returns:
        The metrics of the task, None where undefined;
        ``non_finite_rows``, if there are rows whose answers are not finite; for an
        equilibrium ``converged``, the share of rows whose every block converged, and ``fuse_nfe``
        and (where there are cells) ``cells_nfe``: median and maximum over the rows of the
        evaluations, cells of absent views left out.
    """
    with collect_warnings(ConvergenceWarning):  # the share of converged rows says it
        answers, info = predict(model, data)
    values: dict[str, Any] = {
        name: value if math.isfinite(value) else None  # NaN is no JSON
        for name, value in task.metrics(answers, data.labels).items()
    }
    broken = int((~answers.isfinite().all(1)).sum())
    if broken:
        values["non_finite_rows"] = broken
    if info is not None:
        values["converged"] = info.converged.double().mean().item()
        for name, block in (("fuse_nfe", info.fuse), ("cells_nfe", info.cells)):
            if block is not None:
                nfe = block.nfe[block.outcome != Outcome.ABSENT].double()
                values[name] = [nfe.quantile(0.5).item(), int(nfe.max().item())]
    return values


@contextlib.contextmanager
def collect_warnings(category: type[Warning]) -> Iterator[list[str]]:
    """Collect the messages of one kind of warning instead of printing each; pass others on."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", category)
        yield messages
    for item in caught:
        if issubclass(item.category, category):
            messages.append(str(item.message))
        else:
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(recipe.parameters(model), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def _schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe
) -> torch.optim.lr_scheduler.LRScheduler:
    if recipe.schedule == "step":
        return torch.optim.lr_scheduler.StepLR(
            optimizer, recipe.decay_every, gamma=recipe.decay_factor
        )
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)


def _batches(data: MultiviewData, recipe: Recipe, order: torch.Generator) -> list[MultiviewData]:
    if recipe.batch_size is None:
        return [data]
    shuffled = torch.randperm(data.num_rows, generator=order).to(data.labels.device)
    return [data.rows(index) for index in shuffled.split(recipe.batch_size)]


def _curve(values: Tensor) -> list[float]:
    """Means over up to ``CURVE_POINTS`` stretches of training."""
    return [round(part.mean().item(), 5) for part in values.tensor_split(CURVE_POINTS) if len(part)]
