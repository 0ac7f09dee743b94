"""Reader for CMU-MOSI as MultiBench gives it: a pickle of aligned sequences.

Spoken opinions about movies, each with a sentiment from -3 to 3 (Zadeh et al., "MOSI", 2016). The
pickle is ``{"train": part, "valid": part, "test": part}``; a part has ``text`` (rows, T, 300),
``audio`` (rows, T, 5 or 74) and ``labels`` (rows, 1, 1) as arrays, besides ``vision`` and ``id``,
which are not read. Sequences are filled up with zeros at their beginning. CMU-MOSEI's file has the
same form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deqfuse.data.arrays import load_arrays
from deqfuse.data.multiview import MultiviewData, Splits

__all__ = ["load_mosi"]

PARTS = ("train", "valid", "test")
VIEWS = ("text", "audio")


def load_mosi(path: str | Path) -> Splits:
    """Text and audio (rows, T, width), with the sentiment (rows, 1) as label, float32.

    Rows without any text are left out, as MultiBench does. Minus infinity in the audio (the
    extractor's logarithm of silence) becomes 0. Every feature is shifted and scaled to mean 0 and
    variance 1 on the training rows' positions; positions that are filled up stay 0.

    Args:
        path: the pickle; see :func:`load_arrays` for what it may hold.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not of this form, or holds values that are not finite.
    """
    path = Path(path)
    whole = load_arrays(path)
    if not isinstance(whole, dict) or not set(PARTS) <= set(whole):
        got = sorted(map(str, whole)) if isinstance(whole, dict) else type(whole).__name__
        raise ValueError(f"{path}: expected the parts {', '.join(PARTS)}, got {got}.")
    parts = [_part(path, name, whole[name]) for name in PARTS]
    shapes = [[tuple(view.shape[1:]) for view in part.views] for part in parts]
    if shapes[1:] != shapes[:1] * 2:
        raise ValueError(
            f"{path}: expected the same (T, width) of text and audio in all parts, got {shapes}."
        )
    moments = [_moments(view) for view in parts[0].views]
    return Splits(*(_scaled(part, moments) for part in parts))


def _part(path: Path, name: str, part: Any) -> MultiviewData:
    wanted = (*VIEWS, "labels")
    if not isinstance(part, dict) or not all(
        isinstance(part.get(key), np.ndarray) for key in wanted
    ):
        raise ValueError(f"{path}, {name}: expected arrays {', '.join(wanted)} of numbers.")
    text, audio, labels = (torch.from_numpy(part[key]).float() for key in wanted)
    if text.dim() != 3 or audio.dim() != 3 or text.shape[:2] != audio.shape[:2]:
        raise ValueError(
            f"{path}, {name}: expected aligned text and audio (rows, T, width), got "
            f"{tuple(text.shape)} and {tuple(audio.shape)}. Remedy: the pickle with aligned "
            "sequences."
        )
    if labels.numel() != len(text):
        raise ValueError(
            f"{path}, {name}: expected one label for each of {len(text)} rows, got shape "
            f"{tuple(labels.shape)}."
        )
    audio = audio.where(audio != -torch.inf, 0.0)
    for key, values in (("text", text), ("audio", audio), ("labels", labels)):
        if not values.isfinite().all():
            raise ValueError(
                f"{path}, {name}, {key}: expected finite numbers, got some that are not."
            )
    spoken = (text != 0).flatten(1).any(1)
    if not spoken.any():
        raise ValueError(f"{path}, {name}: expected rows with text, got none of {len(text)}.")
    rows = MultiviewData([text, audio], labels.reshape(-1, 1), VIEWS, ("sentiment",))
    return rows.rows(torch.nonzero(spoken).flatten())


def _moments(view: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of every feature over the positions that hold something."""
    held = view[(view != 0).any(-1)].double()
    if not len(held):
        return view.new_zeros(()), view.new_ones(())
    mean, spread = held.mean(0), held.std(0, correction=0)
    constant = spread <= 1e-6 * mean.abs().clamp(min=1e-6)
    return mean.float(), torch.where(constant, 1.0, spread).float()


def _scaled(part: MultiviewData, moments: list[tuple[Tensor, Tensor]]) -> MultiviewData:
    views = [
        torch.where((view != 0).any(-1, keepdim=True), (view - mean) / spread, 0.0)
        for view, (mean, spread) in zip(part.views, moments, strict=True)
    ]
    return MultiviewData(views, part.labels, part.view_names, part.class_names)
