"""Reader for daily prices of stocks: ``open.csv`` and ``sectors.csv`` of a folder.

``open.csv`` has a column ``Date`` (YYYY-MM-DD) and one of opening prices per stock, adjusted for
splits; ``sectors.csv`` has a line ``Ticker,Sector`` and one per stock.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Prices", "load_prices"]


@dataclass(frozen=True)
class Prices:
    """Opening prices."""

    days: tuple[str, ...]
    tickers: tuple[str, ...]
    opens: Tensor  # (days, tickers) float64
    sectors: dict[str, tuple[int, ...]]  # sector -> positions of its stocks, in the file's order


def load_prices(folder: str | Path) -> Prices:
    """The prices of a folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line has another number of cells, a price is not a positive number, days do
            not rise, or a stock has no sector.
    """
    folder = Path(folder)
    path = folder / "open.csv"
    (head, *body), listed = _lines(path), _lines(folder / "sectors.csv")
    tickers = tuple(head[1:])
    if head[:1] != ["Date"] or not tickers or len(body) < 2:
        raise ValueError(
            f"{path}: expected a first line Date,TICKER,... and two days or more, got {head[:3]} "
            f"and {len(body)} days."
        )
    days = tuple(line[0] for line in body)
    for k in range(1, len(days)):
        if days[k] <= days[k - 1]:
            raise ValueError(
                f"{path}, line {k + 2}: expected days that rise, got {days[k]} after {days[k - 1]}."
            )
    prices = [
        [_price(path, k + 2, name, cell) for name, cell in zip(tickers, line[1:], strict=True)]
        for k, line in enumerate(body)
    ]
    known = {line[0]: line[1] for line in listed[1:] if len(line) == 2}
    if lacking := [name for name in tickers if name not in known]:
        raise ValueError(
            f"{folder / 'sectors.csv'}: expected a line Ticker,Sector for every stock of open.csv, "
            f"got none for {', '.join(lacking)}."
        )
    sectors = {
        sector: tuple(i for i, name in enumerate(tickers) if known[name] == sector)
        for sector in sorted({known[name] for name in tickers})
    }
    return Prices(days, tickers, torch.tensor(prices, dtype=torch.float64), sectors)


def _lines(path: Path) -> list[list[str]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. Expected a folder with open.csv, sectors.csv."
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = [line for line in csv.reader(file) if line]
    if not lines:
        raise ValueError(f"{path}: expected lines, got none.")
    for k, line in enumerate(lines):
        if len(line) != len(lines[0]):
            raise ValueError(
                f"{path}, line {k + 1}: expected {len(lines[0])} cells, got {len(line)}."
            )
    return lines


def _price(path: Path, line: int, name: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(
            f"{path}, line {line}, {name}: expected a price > 0, got {cell!r}. Remedy: leave out "
            "days on which a stock has none."
        )
    return value
