"""Small files in the formats of MultiBench's MM-IMDB and CMU-MOSI."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deqfuse.data.mmimdb import BOUNDS, TABLES

HELD = 80  # rows at the beginning of each part that hold something


def write_mmimdb(path: Path) -> None:
    """The tables at their full size; what is not written is not stored, and reads as zeros."""
    import h5py

    generator = torch.Generator().manual_seed(0)
    with h5py.File(path, "w") as file:
        tables = {
            name: file.create_dataset(name, (BOUNDS[-1], width), "f4", chunks=(HELD, width))
            for name, width in TABLES.items()
        }
        file.create_dataset("imdb_ids", data=np.array([b"0000001"]))
        for start in BOUNDS[:-1]:
            genres = (torch.rand(HELD, 23, generator=generator) > 0.8).float()
            for name, table in tables.items():
                values = torch.randn(HELD, TABLES[name], generator=generator)
                values[:, :23] += 2 * genres
                table[start : start + HELD] = (genres if name == "genres" else values).numpy()


def mosi_parts(rows: int = 70, positions: int = 6) -> dict[str, dict[str, Any]]:
    """Sequences filled up in front, which lean towards their sentiment."""
    generator, parts = np.random.default_rng(0), {}
    for name in ("train", "valid", "test"):
        labels = generator.uniform(-3, 3, (rows, 1, 1)).astype("f4")
        text = generator.normal(size=(rows, positions, 300)).astype("f4") + labels
        audio = 50 + 9 * generator.normal(size=(rows, positions, 5)) + labels
        vision = generator.normal(size=(rows, positions, 20))
        for row in range(rows):
            for view in (text, audio, vision):
                view[row, : row % positions] = 0
        ids = np.array([[f"video{row}", "0", "1"] for row in range(rows)], dtype=object)
        parts[name] = {"text": text, "audio": audio, "vision": vision, "labels": labels, "id": ids}
    return parts


def write_mosi(path: Path, parts: Any = None, protocol: int = 4) -> None:
    """The pickle, of these parts."""
    with path.open("wb") as file:
        pickle.dump(mosi_parts() if parts is None else parts, file, protocol=protocol)


def write_prices(folder: Path, days: int = 130) -> None:
    """open.csv and sectors.csv: two sectors, and prices that wander."""
    sectors = {"AAA": "F&B", "BBB": "TECH", "CCC": "F&B", "DDD": "TECH"}
    steps = torch.randn(days, len(sectors), generator=torch.Generator().manual_seed(0))
    prices = 50 * (0.01 * steps).cumsum(0).exp()
    lines = [
        f"2020-{day // 28 + 1:02}-{day % 28 + 1:02}," + ",".join(f"{p:.4f}" for p in row)
        for day, row in enumerate(prices.tolist())
    ]
    (folder / "open.csv").write_text("\n".join([f"Date,{','.join(sectors)}", *lines]) + "\n")
    listed = [f"{name},{sector}" for name, sector in sectors.items()]
    (folder / "sectors.csv").write_text("\n".join(["Ticker,Sector", *listed]) + "\n")
