"""Readers of MM-IMDB and CMU-MOSI, on small files in the real formats."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paper_cases import HELD, mosi_parts, write_mmimdb, write_mosi

from deqfuse.data.arrays import load_arrays
from deqfuse.data.mmimdb import BOUNDS, load_mmimdb
from deqfuse.data.mosi import load_mosi

# --- arrays out of pickles ---


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_are_those_that_were_saved(tmp_path: Path, protocol: int) -> None:
    saved = {
        "a": np.arange(12, dtype="f4").reshape(3, 4),
        "columns": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "big": np.arange(3, dtype=">i2"),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 5)),
        "scalar": np.float32(1.5),
        "rest": [1, "text", None, (2.5, b"bytes")],
    }
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(saved, protocol=protocol))
    read = load_arrays(path)
    for name in ("a", "columns", "big", "bool", "empty"):
        assert read[name].dtype == saved[name].dtype.newbyteorder("=")
        np.testing.assert_array_equal(read[name], saved[name])
    assert read["rest"] == [1, "text", None, [2.5, b"bytes"]]


class Harmful:
    """What a pickle can do to whoever loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("deep", [False, True])
def test_a_pickle_runs_nothing(tmp_path: Path, deep: bool) -> None:
    harmful: Any = Harmful(tmp_path / "made")
    if deep:  # inside an array of objects, in a dictionary
        harmful = {"id": np.array([harmful, 1], dtype=object)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(harmful))
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.mkdir.*may run any code"):
        load_arrays(tmp_path / "a.pkl")
    assert not (tmp_path / "made").exists()


def test_objects_forged_as_bytes_are_not_built(tmp_path: Path) -> None:
    """NumPy's unpickling takes a type's flags from the file, and with them raw pointers."""
    buffer = io.BytesIO()
    np_pickled = pickle.dumps(np.array([1], dtype="i8"), protocol=2)
    buffer.write(np_pickled.replace(b"i8", b"O8"))
    (tmp_path / "a.pkl").write_bytes(buffer.getvalue())
    assert load_arrays(tmp_path / "a.pkl") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Ran out of input"),
        (b"no pickle", "cannot be read"),
        (pickle.dumps(np.arange(9.0))[:-30], "cannot be read"),
        (
            pickle.dumps(np.arange(4.0), protocol=2).replace(b"K\x04\x85", b"K\x05\x85"),
            r"shape \(5,\) with 32 bytes",
        ),
    ],
)
def test_broken_pickles_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_arrays(tmp_path / "a.pkl")


# --- CMU-MOSI ---


def test_mosi_is_scaled_on_the_training_rows(tmp_path: Path) -> None:
    parts = mosi_parts()
    parts["train"]["audio"][3, 4, 2] = -np.inf  # the extractor's logarithm of silence
    parts["valid"]["text"][7] = 0
    write_mosi(tmp_path / "a.pkl", parts)
    splits = load_mosi(tmp_path / "a.pkl")
    assert [p.num_rows for p in (splits.train, splits.validation, splits.test)] == [70, 69, 70]
    assert splits.train.view_names == ("text", "audio")
    text, audio = splits.train.views
    assert (text.shape, audio.shape) == ((70, 6, 300), (70, 6, 5))
    assert text.dtype == audio.dtype == splits.train.labels.dtype == torch.float32
    assert torch.equal(splits.test.labels, torch.from_numpy(parts["test"]["labels"]).reshape(-1, 1))
    for view in (text, audio):
        filled = torch.arange(6) < (torch.arange(70) % 6)[:, None]
        assert (view[filled] == 0).all()
        held = view[~filled].double()
        assert held.mean(0).abs().max() < 1e-5
        assert (held.std(0, correction=0) - 1).abs().max() < 1e-5
    assert splits.test.views[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("valid"), r"expected the parts train, valid, test, got \['test'"),
        (lambda parts: parts["test"].pop("audio"), "test: expected arrays text, audio, labels"),
        (
            lambda parts: parts["train"].update(audio=np.zeros((70, 9, 5))),
            r"train: expected aligned .*got \(70, 6, 300\) and \(70, 9, 5\). Remedy",
        ),
        (
            lambda parts: parts["train"].update(labels=np.zeros((70, 1, 7))),
            r"one label for each of 70 rows, got shape \(70, 1, 7\)",
        ),
        (lambda parts: parts["valid"]["text"].fill(np.nan), "valid, text: expected finite"),
        (lambda parts: parts["test"]["text"].fill(0), "rows with text, got none of 70"),
        (
            lambda parts: parts["test"].update(audio=np.zeros((70, 6, 74))),
            "the same .* in all parts",
        ),
    ],
)
def test_other_forms_of_mosi_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    parts = mosi_parts()
    change(parts)
    write_mosi(tmp_path / "a.pkl", parts)
    with pytest.raises(ValueError, match=message):
        load_mosi(tmp_path / "a.pkl")


# --- MM-IMDB ---


def test_mmimdb_has_its_own_split(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    write_mmimdb(tmp_path / "a.hdf5")
    splits = load_mmimdb(tmp_path / "a.hdf5", (10, 20, 30))
    with h5py.File(tmp_path / "a.hdf5") as file:
        for k, part in enumerate((splits.train, splits.validation, splits.test)):
            count = 10 * (k + 1)
            rows = slice(BOUNDS[k], BOUNDS[k] + count)
            assert part.num_rows == count <= HELD
            assert part.widths == (300, 4096)
            assert part.num_classes == 23
            for tensor, name in zip(
                (*part.views, part.labels), ("features", "vgg_features", "genres"), strict=True
            ):
                assert tensor.dtype == torch.float32
                np.testing.assert_array_equal(tensor.numpy(), file[name][rows])


def test_other_forms_of_mmimdb_are_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.hdf5"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_mmimdb(path)
    path.write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match="expected an HDF5 file that can be read"):
        load_mmimdb(path)
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((3, 300), "f4")
    with pytest.raises(ValueError, match=r"features: expected a table \(25959, 300\), got .*\(3,"):
        load_mmimdb(path)
    write_mmimdb(path)
    with h5py.File(path, "a") as file:
        file["genres"][BOUNDS[1] + 1, 2] = 2
    with pytest.raises(ValueError, match="expected 0 or 1 only"):
        load_mmimdb(path, (2, 2, 2))
    with h5py.File(path, "a") as file:
        file["features"][1, 2] = np.nan
    with pytest.raises(ValueError, match="features, row 1: expected finite numbers"):
        load_mmimdb(path, (2, 2, 2))
    with h5py.File(path, "a") as file:
        del file["vgg_features"]
    with pytest.raises(ValueError, match="expected the tables features, vgg_features, genres, got"):
        load_mmimdb(path)


def test_missing_h5py_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "h5py":
            raise ModuleNotFoundError("No module named 'h5py'", name="h5py")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "h5py", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"h5py, which is not installed. Remedy: pip install"):
        load_mmimdb(tmp_path / "a.hdf5")
