"""``DEQFusion`` and ``ProFusion`` in MultiBench's training structure, by what it asks of a fusion.

MultiBench itself is not a dependency. The contract, as of its ``Supervised_Learning``: a model owns
encoders, fusion and head; the fusion is called with the list of encodings and nothing else; of an
exact ``tuple`` the first entry goes to the head; encodings and the fusion's whole output stay on
the model and are handed to the objective in a dictionary; after validation the model is saved.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from deqfuse import Anderson, DEQFusion, Outcome, ProFusion, SolveInfo
from deqfuse.nn import WithInfo

EXAMPLE = Path(__file__).parents[2] / "examples" / "multibench.py"


class Model(nn.Module):
    """Encoders, fusion, head; keeps the intermediate results."""

    def __init__(self, encoders: Sequence[nn.Module], fusion: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoders, self.fuse, self.head = nn.ModuleList(encoders), fusion, head
        self.reps: list[Tensor] = []
        self.fuseout: Any = None

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        self.reps = [encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)]
        self.fuseout = self.fuse(self.reps)
        first = self.fuseout[0] if type(self.fuseout) is tuple else self.fuseout
        logits: Tensor = self.head(first)
        return logits


Objective = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


def train(
    encoders: Sequence[nn.Module],
    fusion: nn.Module,
    head: nn.Module,
    train_dataloader: Iterable[list[Tensor]],
    valid_dataloader: Iterable[list[Tensor]],
    total_epochs: int,
    *,
    objective: Objective,
    objective_args_dict: dict[str, Any],
    optimtype: type[torch.optim.Optimizer],
    lr: float,
    save: str | Path,
    track_complexity: bool = False,
) -> None:
    """Epochs of training and validation; the model of best accuracy is saved whole."""
    model, best = Model(encoders, fusion, head), 0.0
    optimizer = optimtype(model.parameters(), lr=lr)  # type: ignore[call-arg]

    def loss_of(batch: list[Tensor], training: bool) -> tuple[Tensor, Tensor]:
        out = model([x.float() for x in batch[:-1]])
        objective_args_dict.update(
            reps=model.reps, fused=model.fuseout, inputs=batch[:-1], training=training
        )
        return objective(out, batch[-1], objective_args_dict), out

    for _ in range(total_epochs):
        model.train()
        for batch in train_dataloader:
            optimizer.zero_grad()
            loss_of(batch, training=True)[0].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 8)
            optimizer.step()
        model.eval()
        hits, rows = 0, 0
        with torch.no_grad():
            for batch in valid_dataloader:
                _, out = loss_of(batch, training=False)
                hits, rows = hits + int((out.argmax(1) == batch[-1]).sum()), rows + len(out)
            if hits / rows > best:
                best = hits / rows
                torch.save(model, save)


@pytest.fixture(scope="module")
def example() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("deqfuse_multibench_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_example(
    example: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The example's own call trains all three models, and what is saved loads and predicts."""
    monkeypatch.chdir(tmp_path)
    package = types.ModuleType("training_structures")
    structure = types.ModuleType("training_structures.Supervised_Learning")
    structure.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, structure.__name__, structure)
    torch.manual_seed(0)
    example.main()
    test = example.Random(128, seed=2)
    for name in ("deq", "pro", "pro_equilibrium"):
        model = torch.load(f"{name}.pt", weights_only=False).eval()
        with torch.no_grad():
            hits = model(test.views).argmax(1) == test.labels
        assert hits.double().mean() > 0.6, f"{name}: chance is 1/3"
        assert type(model.fuseout) is tuple
        assert model.fuseout[1].converged.shape == (128,)


@pytest.mark.parametrize("kind", ["deq", "pro"])
def test_modules_as_they_are(kind: str, tmp_path: Path) -> None:
    """Without a penalty no wrapper is needed either: a tensor comes out, and the model is saved."""
    torch.manual_seed(0)
    encoders: list[nn.Module] = [nn.Linear(6, 8), nn.Linear(4, 8)]
    fusion: nn.Module = DEQFusion(8, 2, num_groups=2)
    if kind == "pro":
        late = DEQFusion(8, 2, combine="weighted_sum")
        encoders, fusion = [nn.Identity()] * 2, ProFusion(encoders, late, 8)
    model = Model(encoders, fusion, nn.Linear(8, 3))
    xs = [torch.randn(5, 6), torch.randn(5, 4)]
    out = model(xs)
    assert type(model.fuseout) is Tensor
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.save(model, tmp_path / "model.pt")  # in the middle of training, graph and all
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(xs), out)


@pytest.mark.parametrize("kind", ["deq", "pro"])
def test_jacobian_penalty_through_the_dictionary(
    example: types.ModuleType, kind: str, tmp_path: Path
) -> None:
    """The objective's penalty is that of the solve, and its gradient reaches the fusion."""
    torch.manual_seed(0)
    encoders, fusion = (
        example.deq_fusion() if kind == "deq" else example.pro_fusion(solver=Anderson())
    )
    model = Model(encoders, fusion, nn.Linear(example.DIM, example.CLASSES))
    data = example.Random(16, seed=0)
    *xs, labels = next(iter(DataLoader(data, batch_size=16)))
    out = model(xs)
    args = {"fused": model.fuseout, "training": True}
    plain = nn.functional.cross_entropy(out, labels)
    torch.manual_seed(1)
    loss = example.objective(out, labels, args)
    fused, info = model.fuseout
    assert torch.equal(fused, model.fuse(model.reps)[0])
    assert isinstance(info, SolveInfo)
    torch.manual_seed(1)
    penalty = info.jacobian_penalty()
    assert penalty > 0
    torch.testing.assert_close(loss - plain, example.JACOBIAN_WEIGHT * penalty)
    assert torch.equal(example.objective(out, labels, {**args, "training": False}), plain)
    (loss - plain).backward()
    assert max(float(p.grad.abs().max()) for p in fusion.parameters() if p.grad is not None) > 0
    torch.save(model, tmp_path / "model.pt")
    kept = torch.load(tmp_path / "model.pt", weights_only=False).fuseout[1]
    assert torch.equal(kept.fuse.residual, info.fuse.residual)


def test_masks_are_handed_on() -> None:
    xs, present = (
        [torch.randn(2, 8), torch.randn(2, 8)],
        torch.tensor([[True, False], [True, True]]),
    )
    _, info = WithInfo(DEQFusion(8, 2, num_groups=2))(xs, present=present)
    assert (info.cells.outcome == Outcome.ABSENT).tolist() == [[False, False], [True, False]]


def test_only_modules_are_wrapped() -> None:
    with pytest.raises(TypeError, match=r"fusion: expected a torch.nn.Module, got type"):
        WithInfo(DEQFusion)  # type: ignore[arg-type]
