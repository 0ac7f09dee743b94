"""Prices, windows of returns, and the models of the finance study."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from paper_cases import write_prices

from deqfuse.data.prices import load_prices
from deqfuse.experiments import finance_report
from deqfuse.experiments.finance import make_windows
from deqfuse.experiments.finance_models import LABELS, FinanceModel
from deqfuse.experiments.study import Record


def test_prices_and_sectors(tmp_path: Path) -> None:
    write_prices(tmp_path)
    prices = load_prices(tmp_path)
    assert prices.tickers == ("AAA", "BBB", "CCC", "DDD")
    assert prices.sectors == {"F&B": (0, 2), "TECH": (1, 3)}
    assert prices.opens.shape == (130, 4)
    second = (tmp_path / "open.csv").read_text().splitlines()[2].split(",")
    assert prices.days[1] == second[0]
    assert prices.opens[1].tolist() == [float(cell) for cell in second[1:]]


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("open.csv", "Date,", "Day,", r"expected a first line Date,TICKER"),
        ("open.csv", "2020-01-02", "2019-01-02", "line 3: expected days that rise"),
        ("open.csv", "2020-01-02,", "2020-01-02,,", "line 3: expected 5 cells, got 6"),
        ("open.csv", "2020-01-02,", "2020-01-02,-", "line 3, AAA: expected a price > 0, got '-"),
        ("sectors.csv", "CCC,F&B\n", "", "got none for CCC"),
    ],
)
def test_faults_of_prices(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    write_prices(tmp_path)
    path = tmp_path / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        load_prices(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected a folder with open\.csv, sectors\.csv"):
        load_prices(tmp_path)


def test_windows_end_before_their_target() -> None:
    opens = torch.tensor([[100.0, 50.0]], dtype=torch.float64) * torch.exp(
        0.1 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).double().cumsum(0)
    )
    splits = make_windows(opens, 9)
    parts = (splits.train, splits.validation, splits.test)
    rows = [part.num_rows for part in parts]
    assert sum(rows) == 59 - 9
    assert rows == [34, 5, 11]  # 68% and 79% of 50, rounded down
    returns = [[math.log(opens[t + 1, k] / opens[t, k]) for k in range(2)] for t in range(59)]
    spread = torch.tensor(returns[: 9 + 34]).std()
    squares = torch.tensor(returns)[9:].square()
    for part, start in zip(parts, (0, 34, 39), strict=True):
        assert part.labels.shape == (part.num_rows, 2)
        for k, view in enumerate(part.views):
            assert view.shape == (part.num_rows, 9, 1)
            for row in (0, part.num_rows - 1):
                day = start + row
                seen = torch.tensor(returns)[day : day + 9, k] / spread
                torch.testing.assert_close(view[row, :, 0], seen)
                target = squares[day, k] / squares[:34].std()
                torch.testing.assert_close(part.labels[row, k], target)


def test_later_days_do_not_change_the_training_rows() -> None:
    """Neither windows nor scales of the training rows know what comes after them."""
    generator = torch.Generator().manual_seed(0)
    opens = (0.1 * torch.randn(60, 2, generator=generator).double()).cumsum(0).exp()
    changed = opens.clone()
    changed[9 + 34 + 1 :] *= 3
    ours, theirs = (make_windows(prices, 9).train for prices in (opens, changed))
    assert torch.equal(ours.labels, theirs.labels)
    assert all(map(torch.equal, ours.views, theirs.views))


def test_too_few_days_are_refused() -> None:
    with pytest.raises(ValueError, match=r"more days than the window of 30 .*got 31 days\. Remedy"):
        make_windows(torch.rand(31, 2).double() + 1, 30)


@pytest.mark.parametrize("key", LABELS)
def test_models_answer_every_stock(key: str) -> None:
    torch.manual_seed(0)
    model = FinanceModel(key, 3, 7)
    answers, info = model.logits([torch.randn(5, 7, 1) for _ in range(3)])
    assert answers.shape == (5, 3)
    assert (info is not None) == (key == "deq")
    answers.square().sum().backward()
    idle = {n.split(".")[1] for n, p in model.named_parameters() if p.grad is None}
    assert idle == ({"back_projections"} if key == "late" else set())
    if key == "pro 2":
        more = model.num_parameters - FinanceModel("late", 3, 7).num_parameters
        assert more == sum(p.numel() for p in model.body.back_projections.parameters())


def test_first_line_says_what_is_worse() -> None:
    """Of errors less is better."""

    def group(errors: list[float]) -> list[Record]:
        return [Record(f"{i}", {}, 0.0, {"test": {"mse": e}}) for i, e in enumerate(errors)]

    models = {"late": group([0.7, 0.8]), "pro 2": group([0.6, 0.7001]), "deq": group([0.9, 1.0])}
    lead = finance_report._lead({"TECH": models}, 2)
    assert "Pro-Fusion, R = 2: TECH better" in lead
    assert "DEQ Fusion: TECH worse" in lead
    models["deq"] = group([0.6, 0.95])
    assert "DEQ Fusion: TECH undecided" in finance_report._lead({"TECH": models}, 2)
