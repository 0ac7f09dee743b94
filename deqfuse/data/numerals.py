"""The UCI *Multiple Features* handwritten numerals: 2000 samples, ten classes, six feature sets.

Source: Robert P.W. Duin, *Multiple Features*, UCI Machine Learning Repository, DOI 10.24432/C5HC70,
CC BY 4.0; see ``DATA_LICENSE.md`` in this folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deqfuse.data.multiview import MultiviewData, Splits, split_stratified

__all__ = ["load_numerals", "split_numerals"]

_FILE = Path(__file__).with_name("numerals.npz")
_VIEWS = ("fac", "fou", "kar", "mor", "pix", "zer")
_FRACTIONS = (0.25, 0.25, 0.5)  # 500 training, 500 validation, 1000 test rows
_SPLIT_SEED = 20230629


def load_numerals() -> MultiviewData:
    """The numerals as published: raw values, the tables' row order (200 rows per class, "0" first).

    Returns:
        Six views named ``fac`` (2000, 216), ``fou`` (2000, 76), ``kar`` (2000, 64), ``mor`` (2000,
        6), ``pix`` (2000, 240) and ``zer`` (2000, 47), float32, rounded once from the published
        decimals; labels (2000,) int64.

    Raises:
        FileNotFoundError: if the installed package lacks its data file.
    """
    if not _FILE.is_file():
        raise FileNotFoundError(
            f"{_FILE}: expected the numerals shipped with deqfuse, got no such file. "
            "Remedy: reinstall deqfuse, or run tools/convert_numerals.py in a checkout."
        )
    with np.load(_FILE, allow_pickle=False) as arrays:
        views = [torch.from_numpy(_decode(arrays, name).astype(np.float32)) for name in _VIEWS]
        labels = torch.from_numpy(arrays["labels"].astype(np.int64))
    return MultiviewData(views, labels, _VIEWS, tuple(map(str, range(10))))


def split_numerals(data: MultiviewData | None = None) -> Splits:
    """The numerals' fixed split: 500 training, 500 validation and 1000 test rows, classes balanced.

    Always the same rows. Views are standardised by the training rows' statistics. Six samples occur
    twice in the published tables, identical in every view; both copies go to the training rows, so
    that no test row has been trained on.

    Args:
        data: the result of :func:`load_numerals`, read again when not given.
    """
    data = load_numerals() if data is None else data
    parts = split_stratified(
        data.labels, _FRACTIONS, seed=_SPLIT_SEED, keep_first=_duplicated(data.views)
    )
    return Splits(*(data.rows(part) for part in parts)).standardized()


def _decode(arrays: Mapping[str, Any], name: str) -> npt.NDArray[np.float64]:
    """(rows, features) from the bytes of zigzag integers and their numbers of decimals."""
    planes = arrays[f"{name}_planes"]  # (bytes, features, rows), uint8
    zigzag = sum(plane.astype(np.int64) << (8 * k) for k, plane in enumerate(planes))
    values = ((zigzag >> 1) ^ -(zigzag & 1)).astype(np.float64)
    if f"{name}_decimals" in arrays:
        # A division by an exact power of ten rounds once, as parsing the decimal text does.
        values = values / 10.0 ** arrays[f"{name}_decimals"].astype(np.float64)
    return np.ascontiguousarray(values.T)


def _duplicated(views: list[Tensor]) -> Tensor:
    """(rows,) bool: the row occurs more than once, identical in all views."""
    joined = torch.cat(views, dim=1)
    _, inverse, counts = joined.unique(dim=0, return_inverse=True, return_counts=True)
    return counts[inverse] > 1
