"""``deqfuse experiment synthetic``: Appendix B.1 of progressive fusion (arXiv 2209.00302).

Two views of a hidden vector; the first is disturbed by what the second sees undisturbed, so whoever
lets the second view into the encoder of the first has an advantage::

    Z uniform in [-2.5, 2.5]^d
    X1 = lrelu(W1 Z) + 2 |eta| sin(W2 Z) + noise
    X2 = sin(W2 Z) + sigma2 noise
    Y  = Wy Z + noise
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqfuse.experiments import synthetic_report
from deqfuse.experiments.batched import ADJOINT, JACOBIAN_WEIGHT, MODELS, SOLVER, BatchedModel
from deqfuse.experiments.study import Record, Study, Trial
from deqfuse.reports.page import Report
from deqfuse.torch_private import scale_in_place

__all__ = ["Problem", "Size", "SyntheticStudy", "draw_problem"]

HELD = 500  # validation rows, and test rows twice as many
MOST_ROWS = {"pro equilibrium": 200, "deq": 500}  # more would take most of the study's time
STUDY_VERSION = 1  # rises when the same settings give other results; older trials are refused
NOISE = 0.1  # standard deviation of the noise in X1 and Y, which the paper leaves open


class Problem(NamedTuple):
    """Two views (T, n, d) and the target (T, n) of T problems."""

    views: list[Tensor]
    target: Tensor

    def rows(self, start: int, stop: int) -> Problem:
        """Rows ``start`` to ``stop`` of every problem."""
        return Problem([v[:, start:stop] for v in self.views], self.target[:, start:stop])


class Size(NamedTuple):
    """What the paper leaves open."""

    dim: int  # d
    rows: int  # n, training rows
    width: int  # of the hidden layers

    @property
    def label(self) -> str:
        """For keys and titles."""
        return f"d = {self.dim}, n = {self.rows}, width {self.width}"


# What the grid leaves out, where the paper's claim holds best (many rows, clean second view); fewer
# problems, because these models take long.
MORE = (
    (Size(5, 1000, 16), ("pro equilibrium", "deq", "deq penalised")),
    (Size(5, 1000, 32), ("base", "pro 2", "pro 3", "deq")),
)


@dataclass(frozen=True)
class SyntheticStudy(Study):
    """Every model on every (eta, sigma2) of every size, ``seeds`` problems each.

    Args:
        seeds: problems per setting: each has its own W1, W2, Wy, rows and initial values.
        sizes: (d, n, width).
        etas, sigmas: the grid.
        more: further sizes with their models, run at sigma2 = 0 for ``more_etas`` on the first
            ``more_seeds`` problems.
        steps: full-batch steps of Adam, with a cosine schedule.
        learning_rate: of Adam.
        evaluate_every: steps between looks at the validation rows.
        patience: training ends when no problem has had a better step for so many.
    """

    seeds: int = 30
    sizes: tuple[Size, ...] = (Size(5, 200, 16), Size(10, 500, 16), Size(5, 1000, 16))
    etas: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    sigmas: tuple[float, ...] = (0.0, 0.5, 1.0)
    more: tuple[tuple[Size, tuple[str, ...]], ...] = MORE
    more_etas: tuple[float, ...] = (0.0, 1.0)
    more_seeds: int = 10
    steps: int = 300
    learning_rate: float = 5e-3
    evaluate_every: int = 10
    patience: int = 60
    name = "synthetic"

    def settings(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "version": STUDY_VERSION,
            "noise": NOISE,
            "held": HELD,
            "most_rows": MOST_ROWS,
            "jacobian_weight": JACOBIAN_WEIGHT,
            "equilibrium": f"{SOLVER}, {ADJOINT}",
        }

    def trials(self) -> list[Trial]:
        grid = [
            Trial(
                f"{size.label}, eta {eta:g}, sigma2 {sigma:g}, {model}",
                {"size": list(size), "eta": eta, "sigma": sigma, "model": model},
            )
            for size, eta, sigma, model in itertools.product(
                self.sizes, self.etas, self.sigmas, MODELS
            )
            if size.rows <= MOST_ROWS.get(model, size.rows)
        ]
        seeds = min(self.more_seeds, self.seeds)
        more = [
            Trial(
                f"{size.label}, eta {eta:g}, sigma2 0, {model}, {seeds} problems",
                {"size": list(size), "eta": eta, "sigma": 0.0, "model": model, "seeds": seeds},
            )
            for size, models in self.more
            for eta, model in itertools.product(self.more_etas, models)
        ]
        return [*grid, *more]

    def run(self, trial: Trial) -> dict[str, Any]:
        p = trial.params
        size = Size(*p["size"])
        seeds = range(p.get("seeds", self.seeds))
        problem = draw_problem(size, p["eta"], p["sigma"], seeds)
        train = problem.rows(0, size.rows)
        validation = problem.rows(size.rows, size.rows + HELD)
        model = BatchedModel(p["model"], seeds, size.dim, size.width)
        values = self._fit(model, train, validation)
        model.eval()
        # The only place that reads the test rows.
        test = problem.rows(size.rows + HELD, size.rows + 3 * HELD)
        with torch.no_grad():
            predicted, converged = model(test.views)
        errors = _errors(predicted, test.target)
        values["test_mse"] = [round(e, 7) for e in errors.tolist()]
        values["converged"] = None if converged is None else converged.double().mean().item()
        return values

    def report(self, records: Sequence[Record]) -> Report:
        return synthetic_report.build(records, self.settings())

    def files(self) -> list[str]:
        return synthetic_report.files(self.settings())

    def _fit(self, model: BatchedModel, train: Problem, validation: Problem) -> dict[str, Any]:
        """Train all models of the batch; each keeps the parameters of its own best step."""
        parameters = list(model.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        best = train.target.new_full((len(train.target),), float("inf"))
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        chosen = torch.zeros(len(best), dtype=torch.int64)
        shares, last_gain = [], 0
        for step in range(1, self.steps + 1):
            model.train()
            optimizer.zero_grad(set_to_none=True)
            predicted, converged = model(train.views)
            # A sum over models: the gradient of each is that of its own mean.
            loss = _errors(predicted, train.target).sum()
            if model.penalty is not None:
                loss = loss + model.penalty
            loss.backward()
            _clip_each(model, 1.0)
            optimizer.step()
            schedule.step()
            if converged is not None:
                shares.append(converged.double().mean())
            if step % self.evaluate_every == 0 or step == self.steps:
                model.eval()
                with torch.no_grad():
                    errors = _errors(model(validation.views)[0], validation.target)
                better = errors < best
                best, chosen = torch.where(better, errors, best), chosen.where(~better, step)
                _keep(model, kept, better)
                last_gain = step if better.any() else last_gain
                if step - last_gain >= self.patience:
                    break
        model.load_state_dict(kept)
        return {
            "validation_mse": [round(e, 7) for e in best.tolist()],
            "chosen_step": chosen.tolist(),
            "train_converged": torch.stack(shares).mean().item() if shares else None,
        }


def draw_problem(size: Size, eta: float, sigma: float, seeds: Sequence[int]) -> Problem:
    """One problem per seed; those of one seed share everything but eta and sigma2."""
    total, parts = size.rows + 3 * HELD, []
    for seed in seeds:
        generator = torch.Generator().manual_seed(10_000 + seed)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator)

        w1, w2 = normal(size.dim, size.dim), normal(size.dim, size.dim)
        wy = normal(size.dim)
        z = 5 * torch.rand(total, size.dim, generator=generator) - 2.5
        wave = torch.sin(z @ w2 / size.dim**0.5)
        first = F.leaky_relu(z @ w1 / size.dim**0.5) + 2 * abs(eta) * wave
        first = first + NOISE * normal(total, size.dim)
        second = wave + sigma * normal(total, size.dim)
        target = z @ wy / size.dim**0.5 + NOISE * normal(total)
        parts.append((first, second, target))
    first, second, target = (torch.stack(part) for part in zip(*parts, strict=True))
    return Problem([first, second], target)


def _errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each model: (T,)."""
    return (predicted - target).square().mean(1)


def _clip_each(model: BatchedModel, limit: float) -> None:
    """Clip the gradient norm of every model of the batch on its own."""
    shared = [p.grad for p in model.shared.values() if p.grad is not None]
    squares = torch.stack([g.flatten(1).square().sum(1) for g in shared]).sum(0)
    own = [[p.grad for p in layer.parameters() if p.grad is not None] for layer in model.layers]
    if own:
        squares = squares + torch.stack([nn.utils.get_total_norm(grads) for grads in own]).square()
    factors = limit / squares.sqrt().clamp(min=limit)
    for g in shared:
        g.mul_(factors.view(-1, 1, 1))
    for grads, factor in zip(own, factors, strict=False):
        scale_in_place(grads, factor)


def _keep(model: BatchedModel, kept: dict[str, Tensor], better: Tensor) -> None:
    """Copy the parameters of the models whose validation error is the best so far."""
    for name, value in model.state_dict().items():
        if name.startswith("layers."):
            if better[int(name.split(".")[1])]:
                kept[name].copy_(value)
        else:
            kept[name][better] = value[better]
