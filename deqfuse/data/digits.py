"""Readers for digits seen and spoken: MNIST's idx files, Free Spoken Digit recordings.

Only the standard library reads files: ``gzip``, ``struct`` and ``wave``.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Recordings", "load_images", "load_recordings", "read_idx", "read_wav", "spectrogram"]

SAMPLE_RATE = 8000  # of the Free Spoken Digit recordings
SIDE = 112  # of a spectrogram, as in AVMNIST
_DTYPES = {
    0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"
}  # fmt: skip
_NAME = re.compile(r"(\d)_(\w+?)_(\d+)\.wav")


@dataclass(frozen=True)
class Recordings:
    """Spoken digits."""

    waves: list[Tensor]  # each (samples,) float32 in [-1, 1]
    labels: Tensor  # (count,) int64, the digit
    numbers: Tensor  # (count,) int64, the last part of the file name: 0-4 are the usual test rows


def read_idx(path: str | Path) -> Tensor:
    """The tensor in an idx file, gzipped or not.

    Two zero bytes, a type code, the number of dimensions, one big-endian uint32 per dimension, then
    the values, also big-endian (yann.lecun.com/exdb/mnist).

    Returns:
        Any shape; uint8, int8, int16, int32, float32 or float64.

    Raises:
        ValueError: the file is not of this format, or its length disagrees with its header.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got {error}.") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        raise ValueError(
            f"{path}: expected an idx file (0 0 type dimensions), got {content[:4]!r}."
        )
    dimensions = content[3]
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(f"{path}: expected {dimensions} dimensions, the header ends before them.")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    dtype = np.dtype(_DTYPES[content[2]])
    expected = math.prod(shape) * dtype.itemsize
    if len(content) - start != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes for shape {shape}, got {len(content) - start}. "
            "Remedy: fetch the file again."
        )
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return torch.from_numpy(values.astype(dtype.newbyteorder("=")))


def load_images(folder: str | Path, part: str) -> tuple[Tensor, Tensor]:
    """Images and labels of MNIST or of a set in its format.

    Args:
        folder: holds ``{prefix}-images-idx3-ubyte`` and ``{prefix}-labels-idx1-ubyte`` (also with a
            dot before ``idx``, also gzipped), prefix ``train`` or ``t10k``.
        part: "train" or "test".

    Returns:
        (rows, 1, height, width) float32 in [0, 1]; labels (rows,) int64.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or the numbers of images and labels differ.
    """
    prefix = {"train": "train", "test": "t10k"}[part]
    images = read_idx(_find(Path(folder), f"{prefix}-images", "idx3-ubyte"))
    labels = read_idx(_find(Path(folder), f"{prefix}-labels", "idx1-ubyte"))
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
        raise ValueError(
            f"{folder}: expected images (rows, height, width) and as many labels, got "
            f"{tuple(images.shape)} and {tuple(labels.shape)} in the {prefix} files."
        )
    return images[:, None].float() / 255, labels.long()


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """A PCM recording: (samples,) float32 in [-1, 1], channels averaged, and its sample rate.

    Raises:
        ValueError: not a PCM wav file, or of 24 bits.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: expected a PCM wav file, got {error or 'no header'}.") from None
    if width not in (1, 2, 4):
        raise ValueError(f"{path}: expected 8, 16 or 32 bits per sample, got {8 * width}.")
    # 8-bit samples are unsigned, wider ones signed.
    read = np.frombuffer(frames, {1: "u1", 2: "<i2", 4: "<i4"}[width]).astype(np.float32)
    samples = torch.from_numpy(read.reshape(-1, channels).mean(1))
    return ((samples - 128) / 128 if width == 1 else samples / 2.0 ** (8 * width - 1)), rate


def load_recordings(folder: str | Path) -> Recordings:
    """All ``{digit}_{speaker}_{number}.wav`` of a folder, sorted by name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file is no PCM recording, is empty, or has another rate than 8000 Hz.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of recordings.")
    found = [(path, _NAME.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    named = [(path, match) for path, match in found if match]
    if not named:
        raise FileNotFoundError(
            f"{folder}: no recording named {{digit}}_{{speaker}}_{{number}}.wav."
        )
    waves = []
    for path, _ in named:
        samples, rate = read_wav(path)
        if rate != SAMPLE_RATE or not len(samples):
            raise ValueError(
                f"{path}: expected samples at {SAMPLE_RATE} Hz, got {len(samples)} at {rate} Hz. "
                "Remedy: resample the recordings, or leave the file out."
            )
        waves.append(samples)
    return Recordings(
        waves,
        torch.tensor([int(match[1]) for _, match in named]),
        torch.tensor([int(match[3]) for _, match in named]),
    )


def spectrogram(samples: Tensor) -> Tensor:  # (samples,) -> (1, 112, 112)
    """Log magnitudes of one second: 112 frequencies x 112 frames, mean 0 and variance 1.

    Shorter recordings are followed by silence, longer ones are cut.
    """
    padded = torch.zeros(SAMPLE_RATE)
    kept = min(len(samples), SAMPLE_RATE)
    padded[:kept] = samples[:kept]
    size = 2 * (SIDE - 1)
    found = torch.stft(padded, size, 72, window=torch.hann_window(size), return_complex=True)
    logs = (found.abs()[:, :SIDE] + 1e-4).log()
    return ((logs - logs.mean()) / logs.std().clamp(min=1e-6))[None]


def _find(folder: Path, stem: str, kind: str) -> Path:
    for name in (f"{stem}-{kind}", f"{stem}.{kind}"):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{folder}: expected {stem}-{kind} or {stem}-{kind}.gz, got neither.")
