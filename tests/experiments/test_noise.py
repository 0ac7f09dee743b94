"""Noise on the views: the curve of a model, the section of the omics study."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from deqfuse.data import MultiviewData
from deqfuse.experiments import noise
from deqfuse.experiments.absence import absence_trials
from deqfuse.experiments.measurements import noise_curve
from deqfuse.experiments.mmdynamics import LABELS
from deqfuse.experiments.study import Record


class Collects(nn.Module):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Sequence[Tensor]] = []

    def logits(self, views: Sequence[Tensor]) -> tuple[Tensor, None]:
        self.seen.append(views)
        return torch.zeros(views[0].shape[0], 2), None


def test_noise_has_the_scale_of_the_feature() -> None:
    rows, model = 4000, Collects()
    views = [torch.full((rows, 2), 3.0), torch.full((rows, 1), -1.0)]
    data = MultiviewData(views, torch.zeros(rows, dtype=torch.int64), ("a", "b"), ("0", "1"))
    scales = [torch.tensor([1.0, 0.0]), torch.tensor([5.0])]
    noise_curve(model, data, (0.0, 2.0), None, 0, scales)
    clean, noisy = model.seen
    assert all(torch.equal(a, b) for a, b in zip(clean, views, strict=True))
    spread = torch.cat([view.std(0) for view in noisy])
    torch.testing.assert_close(spread, torch.tensor([2.0, 0.0, 10.0]), rtol=0.05, atol=0)
    noise_curve(model, data, (0.0, 2.0), 1, 0, scales)
    assert torch.equal(model.seen[-1][0], views[0])
    assert torch.equal(model.seen[-1][1], noisy[1])  # the same noise for every model


def test_section_integrates_the_difference() -> None:
    """Against concatenation and the weighted sum, seed by seed, the same training."""
    levels = len(noise.NOISE_LEVELS)
    flat = {"concat": (0.8, 0.7), "weighted": (0.6, 0.7), "deq": (0.7, 0.5)}  # complete, dropout
    records = [
        Record(
            trial.key,
            trial.params,
            1.0,
            {
                "noise": [
                    flat[trial.params["absent"]][trial.params["dropout"]]
                    + 0.01 * trial.params["seed"]
                ]
                * levels
            },
        )
        for trial in absence_trials(tuple(flat), LABELS, seeds=2)
    ]
    section = noise.noise_section(records, LABELS)
    assert section.table is not None
    rows = {row[:2]: row[2:] for row in section.table.rows}
    accuracies = rows["DEQ Fusion", "complete rows"][:levels]
    assert accuracies == ("70.5 ± 0.7",) * levels
    # Over levels from 0 to 4: four times the difference in points.
    assert rows["DEQ Fusion", "complete rows"][levels:] == (
        "-40.0 ± 0.0 (0 up, 2 down)", "+40.0 ± 0.0 (2 up, 0 down)",
    )  # fmt: skip
    assert rows["DEQ Fusion", "modality dropout"][levels].startswith("-80.0")
    assert rows["concatenation", "complete rows"][levels] == "-"
    assert section.picture is not None
    assert section.picture.name == noise.FILE
    curve = noise.noise_summary(records, LABELS)["DEQ Fusion, trained: complete rows"]
    assert curve["4"]["mean"] == pytest.approx(70.5)
