"""Arrays out of a pickle, without running what the pickle says.

A pickle is a program: loading one from somebody else with ``pickle.load`` runs whatever its author
wanted, and NumPy's own unpickling trusts the file with raw memory. Here nothing of a file is
called. Its arrays are recorded as numbers and bytes and built afterwards, of plain number types
only; any other name that the file asks for is refused.
"""

from __future__ import annotations

import codecs
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["load_arrays"]

MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
NUMBERS = re.compile(r"[biuf]\d{1,2}")  # types that are built: bool, int, unsigned, float


class _Dtype:
    """What a file says of a type: its code, and its byte order in the state."""

    def __init__(self, code: Any, *flags: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def build(self) -> np.dtype[Any] | None:
        """The type; None if it is not one of numbers."""
        if not isinstance(self.code, str) or not NUMBERS.fullmatch(self.code):
            return None
        return np.dtype(self.code).newbyteorder(">" if self.order == ">" else "<")


class _Array:
    """What a file says of an array: (version, shape, type, whether columns come first, data)."""

    def __init__(self, state: tuple[Any, ...] | None = None) -> None:
        self.state = state

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def build(self) -> Any:
        """The array; of objects (strings, say) None, as they are not needed."""
        if self.state is None:
            raise ValueError("an array without content")
        _, shape, dtype, columns, data = self.state
        kind = dtype.build() if isinstance(dtype, _Dtype) else None
        if kind is None or isinstance(data, list):
            return None
        content = data.encode("latin1") if isinstance(data, str) else bytes(data)
        if len(content) != math.prod(shape) * kind.itemsize:
            raise ValueError(f"an array of shape {shape} with {len(content)} bytes")
        values = np.frombuffer(content, kind).reshape(shape, order="F" if columns else "C")
        return values.astype(kind.newbyteorder("="))


def _reconstruct(*nothing: Any) -> _Array:
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> _Array:
    return _Array((1, shape, dtype, order == "F", data))


def _scalar(dtype: Any, data: Any = None) -> Any:
    return data


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How pickles before protocol 3 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in another encoding than latin1")
    return codecs.encode(text, "latin1")


def _no_bytes() -> bytes:
    """How they write none."""
    return b""


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    **{(module, "_reconstruct"): _reconstruct for module in MULTIARRAY},
    **{(module, "scalar"): _scalar for module in MULTIARRAY},
    **{(module, "_frombuffer"): _from_buffer for module in NUMERIC},
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """One of the stand-ins above."""
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_arrays(path: str | Path) -> Any:
    """What a pickle holds, of dictionaries, lists, texts, numbers and arrays of numbers.

    Arrays of objects become None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no whole pickle, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        with path.open("rb") as file:
            return _built(_Restricted(file, encoding="latin1").load())
    except Exception as error:  # a broken pickle raises anything
        raise ValueError(
            f"{path}: expected a pickle of dictionaries and NumPy arrays, got one that cannot be "
            f"read as such ({error}). A pickle may run any code when it is loaded, so that nothing "
            "else in it is accepted. Remedy: fetch the file again, or load it where you trust it "
            "and save the arrays anew."
        ) from None


def _built(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.build()
    if isinstance(value, dict):
        return {key: _built(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_built(item) for item in value]
    return value
