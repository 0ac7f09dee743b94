"""Warm starts of a training: the same equilibria, in fewer evaluations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from deqfuse import Anderson, DEQFusion, Outcome, WarmStart, backends

R, N, DIM = 24, 2, 64
BACKENDS = [name for name in ("cpu", "reference") if backends.load(name).unavailable() is None]
SOLVER = Anderson(tol=1e-4, max_iter=50)


@pytest.fixture(params=BACKENDS)
def fusion(request: Any) -> DEQFusion:
    torch.manual_seed(0)
    return DEQFusion(DIM, N, solver=SOLVER, backend=request.param, on_failure="raise")


def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(R, DIM) for _ in range(N)]


def evaluations(info: Any) -> float:
    return float(info.cells.nfe.float().mean() + info.fuse.nfe.float().mean())


def moved(fusion: DEQFusion, step: float) -> None:
    """All parameters a step further along a line, as a small learning rate would."""
    with torch.no_grad():
        for k, p in enumerate(fusion.parameters()):
            torch.manual_seed(k)
            p += step * torch.randn_like(p)


def epochs(warm: WarmStart, count: int, batch: int) -> list[Any]:
    """Shuffled passes over the data; infos and the differences from cold answers, step by step."""
    xs, found = data(), []
    for epoch in range(count):
        torch.manual_seed(epoch)
        for at in torch.randperm(R).split(batch):
            features = [x[at] for x in xs]
            z, info = warm(features, at, return_info=True)
            cold, cold_info = warm.fusion(features, return_info=True)
            off = (z - cold).norm(dim=-1) / cold.norm(dim=-1)
            found.append((epoch, info, cold_info, off.detach()))
            moved(warm.fusion, 1e-4)
    return found


def test_first_call_is_the_cold_one(fusion: DEQFusion) -> None:
    torch.testing.assert_close(
        WarmStart(fusion, R)(data(), torch.arange(R)), fusion(data()), rtol=0, atol=0
    )


def test_same_parameters_need_one_more_evaluation_only(fusion: DEQFusion) -> None:
    warm, rows = WarmStart(fusion, R), torch.arange(R)
    warm(data(), rows)
    _, info = warm(data(), rows, return_info=True)
    assert int(info.cells.nfe.max()) <= 2
    assert int(info.fuse.nfe.max()) <= 2
    assert info.converged.all()


def test_training_finds_what_cold_starts_find_in_fewer_evaluations(fusion: DEQFusion) -> None:
    found = epochs(WarmStart(fusion, R), count=5, batch=8)
    # Rows within tol of one equilibrium are within 2 tol / (1 - contraction) of each other.
    elsewhere = sum(int((off > 20 * SOLVER.tol).sum()) for *_, off in found)
    assert elsewhere == 0
    warm, cold = (
        sum(evaluations(step[which]) for step in found if step[0] >= 2) for which in (1, 2)
    )
    assert warm < 0.6 * cold
    assert all(step[1].converged.all() for step in found)


def test_line_through_two_equilibria_leads_nearer_than_the_last_one(fusion: DEQFusion) -> None:
    line, last, rows = WarmStart(fusion, R), WarmStart(fusion, R), torch.arange(R)
    line(data(), rows)
    moved(fusion, 3e-4)
    for warm in (line, last):
        warm(data(), rows)
    moved(fusion, 3e-4)
    of_line, of_last = (
        evaluations(warm(data(), rows, return_info=True)[1]) for warm in (line, last)
    )
    assert of_line < of_last - 0.5


def test_what_failed_is_no_start(fusion: DEQFusion) -> None:
    fusion.solver, fusion.on_failure = Anderson(tol=1e-4, max_iter=1, rescue=False), "ignore"
    warm, rows = WarmStart(fusion, R), torch.arange(R)
    _, first = warm(data(), rows, return_info=True)
    assert (first.cells.outcome == int(Outcome.MAX_ITER)).all()
    fusion.solver = SOLVER
    _, info = warm(data(), rows, return_info=True)
    _, cold = fusion(data(), return_info=True)
    torch.testing.assert_close(info.cells.nfe, cold.cells.nfe)


def test_old_entries_are_no_starts(fusion: DEQFusion) -> None:
    warm, xs, rows = WarmStart(fusion, R, max_age=2.0), data(), torch.arange(R)
    first = [x[:4] for x in xs]
    warm(first, rows[:4])
    others = [x[4:] for x in xs]
    for _ in range(3):  # 2.5 epochs
        warm(others, rows[4:])
    _, info = warm(first, rows[:4], return_info=True)
    _, cold = fusion(first, return_info=True)
    torch.testing.assert_close(info.cells.nfe, cold.cells.nfe)
    _, info = warm(first, rows[:4], return_info=True)
    assert evaluations(info) < evaluations(cold)


def test_seen_and_unseen_samples_in_one_call(fusion: DEQFusion) -> None:
    warm, xs, rows = WarmStart(fusion, R), data(), torch.arange(R)
    warm([x[:12] for x in xs], rows[:12])
    z, info = warm(xs, rows, return_info=True)
    assert info.converged.all()
    assert int(info.fuse.nfe[:12].max()) <= 2 < int(info.fuse.nfe[12:].min())
    torch.testing.assert_close(z, fusion(xs), rtol=0, atol=1e-2)


def test_absent_cells_keep_what_they_had(fusion: DEQFusion) -> None:
    warm, xs, rows = WarmStart(fusion, R), data(), torch.arange(R)
    present = torch.ones(R, N, dtype=torch.bool)
    warm(xs, rows, present=present)
    lacking = present.clone()
    lacking[:, 0] = False
    z, info = warm(xs, rows, present=lacking, return_info=True)
    assert (info.cells.outcome[0] == int(Outcome.ABSENT)).all()
    torch.testing.assert_close(z, fusion(xs, present=lacking), rtol=0, atol=1e-2)
    _, info = warm(xs, rows, present=present, return_info=True)
    assert int(info.cells.nfe.max()) <= 2


def test_evaluation_neither_reads_nor_writes(fusion: DEQFusion) -> None:
    warm, rows = WarmStart(fusion, R), torch.arange(R)
    warm(data(), rows)
    warm.eval()
    others = [-x for x in data()]
    z, cells = warm(others, rows, return_cells=True)
    torch.testing.assert_close(z, fusion(others), rtol=0, atol=0)
    assert cells.shape == (N, R, DIM)
    warm.train()
    _, info = warm(data(), rows, return_info=True)
    assert int(info.cells.nfe.max()) <= 2


def test_gradients_are_those_of_a_cold_solve() -> None:
    torch.manual_seed(0)
    tight = Anderson(tol=1e-12, max_iter=200)
    fusion = DEQFusion(DIM, N, solver=tight, dtype=torch.float64)
    warm, rows = WarmStart(fusion, R), torch.arange(R)
    xs = [x.double().requires_grad_() for x in data()]
    leaves = [*xs, *fusion.parameters()]
    weight = torch.randn(R, DIM, dtype=torch.float64)
    warm(xs, rows)
    moved(fusion, 1e-4)
    grads = torch.autograd.grad((warm(xs, rows) * weight).sum(), leaves)
    cold = torch.autograd.grad((fusion(xs) * weight).sum(), leaves)
    for ours, theirs in zip(grads, cold, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("lead", [(), (3, 8)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_leading_dimensions_and_storage(lead: tuple[int, ...], dtype: Any) -> None:
    torch.manual_seed(0)
    warm = WarmStart(DEQFusion(DIM, N, on_failure="raise"), R, dtype=dtype)
    count = torch.Size(lead).numel()
    xs, rows = [x[:count].reshape(*lead, DIM) for x in data()], torch.randperm(R)[:count]
    rows = rows.reshape(lead)
    z, zs, info = warm(xs, rows, return_cells=True, return_info=True)
    assert z.shape == (*lead, DIM)
    assert zs.shape == (N, *lead, DIM)
    _, info = warm(xs, rows, return_info=True)
    assert int(info.fuse.nfe.max()) <= 3
    assert info.fuse.nfe.shape == lead


def test_sixteen_bit_features(fusion: DEQFusion) -> None:
    warm = WarmStart(fusion.bfloat16(), R)
    xs, rows = [x.bfloat16() for x in data()], torch.arange(R)
    warm(xs, rows)
    z, info = warm(xs, rows, return_info=True)
    _, cold = fusion(xs, return_info=True)
    assert z.dtype is torch.bfloat16
    assert info.converged.all()
    assert evaluations(info) < 0.6 * evaluations(cold)


def test_under_compile(fusion: DEQFusion) -> None:
    warm, rows = WarmStart(fusion, R), torch.arange(R)
    warm(data(), rows)
    compiled = torch.compile(warm, backend="aot_eager")
    for _ in range(3):
        z, info = compiled(data(), rows, return_info=True)
    assert int(info.cells.nfe.max()) <= 2
    torch.testing.assert_close(z, fusion(data()), rtol=0, atol=1e-2)


def test_table_is_a_matter_of_this_run(fusion: DEQFusion) -> None:
    warm, rows = WarmStart(fusion, R), torch.arange(R)
    with torch.inference_mode():  # a look before training must not leave memory that it cannot use
        warm(data(), rows)
    warm(data(), rows)
    assert set(warm.state_dict()) == {f"fusion.{name}" for name in fusion.state_dict()}
    assert not list(warm.buffers())
    twin = copy.deepcopy(warm)
    _, info = twin(data(), rows, return_info=True)
    assert int(info.cells.nfe.max()) <= 2
    warm.reset()
    _, info = warm(data(), rows, return_info=True)
    assert int(info.cells.nfe.max()) > 2


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda w: WarmStart(torch.nn.Linear(2, 2), R), TypeError, ("fusion", "DEQFusion")),
        (
            lambda w: WarmStart(DEQFusion(8, 2, weight_tied_steps=2), R),
            ValueError,
            ("fusion", "weight_tied_steps"),
        ),
        (
            lambda w: WarmStart(DEQFusion(8, 2, combine="weighted_sum"), R),
            ValueError,
            ("fusion", "weighted_sum"),
        ),
        (lambda w: WarmStart(w.fusion, 0), ValueError, ("num_rows", "0")),
        (lambda w: WarmStart(w.fusion, R, dtype=torch.int32), TypeError, ("dtype", "int32")),
        (lambda w: WarmStart(w.fusion, R, max_age=-1.0), ValueError, ("max_age", "-1")),
        (lambda w: w(data(), torch.arange(R) + 1), ValueError, ("rows", "num_rows", "24")),
        (lambda w: w(data(), torch.arange(R) - 1), ValueError, ("rows", "num_rows", "-1")),
        (lambda w: w(data(), torch.arange(R - 1)), ValueError, ("rows", "(24,)", "(23,)")),
        (lambda w: w(data(), torch.arange(R).int()), TypeError, ("rows", "int64", "int32")),
        (lambda w: w(data(), list(range(R))), TypeError, ("rows", "list")),
        (lambda w: w(data()[0], torch.arange(R)), TypeError, ("features",)),
    ],
)
def test_refusals(call: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        call(WarmStart(DEQFusion(DIM, N), R))
    for word in words:
        assert word in str(caught.value)
