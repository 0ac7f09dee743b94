"""Readers of digits seen and spoken, on small files in the real formats."""

from __future__ import annotations

import gzip
import math
import struct
import wave
from pathlib import Path

import pytest
import torch

from deqfuse.data import digits


def write_idx(path: Path, values: torch.Tensor) -> None:
    """An idx file of unsigned bytes."""
    head = struct.pack(f">2xBB{values.dim()}I", 0x08, values.dim(), *values.shape)
    content = head + values.to(torch.uint8).numpy().tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_wav(path: Path, samples: list[int], rate: int = 8000, width: int = 2) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        low = -128 if width == 1 else 0  # 8-bit samples are unsigned
        file.writeframes(
            b"".join((s - low).to_bytes(width, "little", signed=width > 1) for s in samples)
        )


@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_idx_values_and_shape(tmp_path: Path, name: str) -> None:
    values = torch.arange(24).reshape(2, 3, 4)
    write_idx(tmp_path / name, values)
    read = digits.read_idx(tmp_path / name)
    assert read.dtype == torch.uint8
    assert torch.equal(read.long(), values)


def test_idx_is_big_endian(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(struct.pack(">2xBBI2i", 0x0C, 1, 2, 1, -70000))
    assert digits.read_idx(tmp_path / "a").tolist() == [1, -70000]
    (tmp_path / "a").write_bytes(struct.pack(">2xBBIf", 0x0D, 1, 1, 0.5))
    assert digits.read_idx(tmp_path / "a").tolist() == [0.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an idx file"),
        (b"PK\x03\x04", "expected an idx file"),
        (b"\0\0\x08\x03\0\0", "expected 3 dimensions, the header ends before them"),
        (b"\0\0\x08\x01\0\0\0\x05ab", r"expected 5 bytes for shape \(5,\), got 2"),
    ],
)
def test_broken_idx_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        digits.read_idx(tmp_path / "a")


@pytest.mark.parametrize("names", ["{}-images-idx3-ubyte", "{}-images.idx3-ubyte.gz"])
def test_images_of_both_parts(tmp_path: Path, names: str) -> None:
    for prefix, rows in (("train", 3), ("t10k", 2)):
        write_idx(tmp_path / names.format(prefix), torch.full((rows, 4, 5), 255))
        labels = names.format(prefix).replace("images", "labels").replace("idx3", "idx1")
        write_idx(tmp_path / labels, torch.arange(rows))
    for part, rows in (("train", 3), ("test", 2)):
        images, labels_read = digits.load_images(tmp_path, part)
        assert images.shape == (rows, 1, 4, 5)
        assert images.dtype == torch.float32
        assert images.max() == 1.0
        assert labels_read.tolist() == list(range(rows))


def test_missing_and_mismatched_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected train-images-idx3-ubyte or .*\.gz"):
        digits.load_images(tmp_path, "train")
    write_idx(tmp_path / "train-images-idx3-ubyte", torch.zeros(3, 4, 4))
    write_idx(tmp_path / "train-labels-idx1-ubyte", torch.zeros(2))
    with pytest.raises(ValueError, match=r"expected images .* as many labels"):
        digits.load_images(tmp_path, "train")


@pytest.mark.parametrize(("width", "full"), [(1, 2**7), (2, 2**15), (4, 2**31)])
def test_wav_scale(tmp_path: Path, width: int, full: int) -> None:
    write_wav(tmp_path / "a.wav", [0, full // 2, -full], width=width)
    samples, rate = digits.read_wav(tmp_path / "a.wav")
    assert rate == 8000
    assert samples.dtype == torch.float32
    assert samples.tolist() == [0.0, 0.5, -1.0]


def test_wav_channels_are_averaged(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(struct.pack("<4h", 0, 2**14, -(2**14), -(2**14)))
    assert digits.read_wav(tmp_path / "a.wav")[0].tolist() == [0.25, -0.5]


def test_recordings_are_named_after_digit_speaker_and_number(tmp_path: Path) -> None:
    for name in ("7_jackson_32.wav", "0_theo_4.wav", "3_lucas_of_x_11.wav"):
        write_wav(tmp_path / name, [1, 2, 3])
    (tmp_path / "README").write_text("not a recording")
    found = digits.load_recordings(tmp_path)
    assert found.labels.tolist() == [0, 3, 7]
    assert found.numbers.tolist() == [4, 11, 32]
    assert [len(samples) for samples in found.waves] == [3, 3, 3]


def test_bad_recordings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        digits.load_recordings(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no recording named"):
        digits.load_recordings(tmp_path)
    (tmp_path / "1_a_1.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="expected a PCM wav file"):
        digits.load_recordings(tmp_path)
    write_wav(tmp_path / "1_a_1.wav", [1], rate=16000)
    with pytest.raises(ValueError, match="expected samples at 8000 Hz, got 1 at 16000 Hz"):
        digits.load_recordings(tmp_path)
    write_wav(tmp_path / "1_a_1.wav", [1, 2], width=3)
    with pytest.raises(ValueError, match="expected 8, 16 or 32 bits per sample, got 24"):
        digits.load_recordings(tmp_path)


@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_spectrogram_shows_the_tone(seconds: float) -> None:
    time = torch.arange(round(8000 * seconds)) / 8000
    picture = digits.spectrogram(torch.sin(2 * math.pi * 1000 * time))
    assert picture.shape == (1, 112, 112)
    assert abs(picture.mean().item()) < 1e-5
    assert picture.std().item() == pytest.approx(1, abs=1e-3)
    loudest = picture[0, :, 10].argmax().item()
    assert loudest == pytest.approx(1000 / 4000 * 111, abs=1)  # 111 bins up to half the rate
    if seconds < 1:
        assert picture[0, :, -1].max() < picture[0, :, 10].max() - 1  # silence after it
