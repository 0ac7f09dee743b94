"""Reader for MM-IMDB as MultiBench gives it: ``multimodal_imdb.hdf5``.

Posters and plots of movies, each with any of 23 genres (Arevalo et al., "Gated Multimodal Units for
Information Fusion", 2017). Of the file's tables these are read: ``features``, the mean word2vec
vector of the plot; ``vgg_features`` of the poster; ``genres``, 0 or 1 for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deqfuse.data.multiview import MultiviewData, Splits

__all__ = ["load_mmimdb"]

TABLES = {"features": 300, "vgg_features": 4096, "genres": 23}  # columns
BOUNDS = (0, 15552, 18160, 25959)  # the dataset's own split, as MultiBench has it


def load_mmimdb(path: str | Path, rows: tuple[int, int, int] | None = None) -> Splits:
    """Text and poster features, with the genres as labels (rows, 23) float32.

    The genres have no names in the file; they are numbered.

    Args:
        path: ``multimodal_imdb.hdf5``.
        rows: at most so many training, validation and test rows, the first ones; all when None.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is no HDF5, or lacks a table, rows or columns, or holds values that are
            not finite, or genres other than 0 and 1.
    """
    h5py, path = _h5py(), Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. Expected MultiBench's multimodal_imdb.hdf5."
        )
    try:
        with h5py.File(path, "r") as file:
            tables = {name: _table(path, file, name) for name in TABLES}
            parts = []
            for k, start in enumerate(BOUNDS[:-1]):
                stop = BOUNDS[k + 1] if rows is None else min(BOUNDS[k + 1], start + rows[k])
                read = [_rows(path, name, tables[name], start, stop) for name in TABLES]
                parts.append(_part(*read))
    except OSError as error:
        raise ValueError(
            f"{path}: expected an HDF5 file that can be read, got: {error}. Remedy: fetch the file "
            "again."
        ) from None
    return Splits(*parts)


def _h5py() -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ImportError(
            "MM-IMDB: the file needs the Python package h5py, which is not installed. Remedy: pip "
            "install 'deqfuse[mmimdb]', or pip install h5py"
        ) from error
    return h5py


def _table(path: Path, file: Any, name: str) -> Any:
    found = file.get(name)
    if found is None:
        raise ValueError(
            f"{path}: expected the tables {', '.join(TABLES)}, got {', '.join(sorted(file))}."
        )
    expected = (BOUNDS[-1], TABLES[name])
    shape = getattr(found, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] < expected[0] or shape[1] != expected[1]:
        raise ValueError(f"{path}, {name}: expected a table {expected}, got shape {shape}.")
    return found


def _rows(path: Path, name: str, table: Any, start: int, stop: int) -> Tensor:
    values = torch.from_numpy(table[start:stop]).float()
    broken = torch.nonzero(~values.isfinite().all(1)).flatten()
    if len(broken):
        raise ValueError(
            f"{path}, {name}, row {start + int(broken[0])}: expected finite numbers, got some that "
            "are not."
        )
    if name == "genres" and not ((values == 0) | (values == 1)).all():
        raise ValueError(f"{path}, genres: expected 0 or 1 only, got other numbers.")
    return values


def _part(text: Tensor, image: Tensor, genres: Tensor) -> MultiviewData:
    names = tuple(f"genre {k + 1}" for k in range(genres.shape[1]))
    return MultiviewData([text, image], genres, ("text", "image"), names)
