"""The epoch benchmark: everybody trains the same model from the same state."""

from __future__ import annotations

import pytest
import torch

from benchmarks import epoch
from benchmarks.cases import Case
from benchmarks.epoch import Training
from benchmarks.variants import fastest_backend

CASE = Case("tiny", 8, 2, 16, tol=1e-6)
pytestmark = pytest.mark.filterwarnings("ignore")


def test_contenders_take_the_same_steps() -> None:
    """The same loss after ten epochs, warm or cold, and by rivals; probes are those of a seed."""
    first = Training.new(CASE)
    losses = {}
    for name in (fastest_backend(), epoch.WARM, "released"):
        own = first.copy()
        forward = epoch._forward(name, own.problem)
        for i in range(10):
            torch.manual_seed(i)
            own.epoch(lambda xs, forward=forward: (forward(xs)[0], torch.zeros(())))
        losses[name] = own.loss
    ours, *others = losses.values()
    assert others == pytest.approx([ours] * 2, rel=1e-3)
    assert ours < epoch.F.cross_entropy(first.head(first.problem.layer(first.problem.features)),
                                        first.labels)  # fmt: skip


def test_a_copy_trains_alone_and_goes_on_with_adam() -> None:
    first = Training.new(CASE)
    forward = epoch._forward(fastest_backend(), first.problem)
    first.epoch(forward)
    twin = first.copy()
    assert twin.adam.state_dict()["state"][0]["step"] == 1
    before = first.problem.layer.modality_weights.detach().clone()
    twin.epoch(epoch._forward(fastest_backend(), twin.problem))
    assert torch.equal(first.problem.layer.modality_weights, before)
    assert not torch.equal(twin.problem.layer.modality_weights, before)


def test_every_phase_is_measured_of_every_contender() -> None:
    samples, losses = epoch.measure(CASE, 0.0, (2, 2))
    assert {fastest_backend(), epoch.WARM} <= set(samples) == set(losses)
    for taken in samples.values():
        assert [len(phases) for phases in taken] == [3, 3]
        assert all(seconds > 0 for phases in taken for seconds in phases)
