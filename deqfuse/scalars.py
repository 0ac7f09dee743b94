"""Checks of single values. Each gives the value back as a plain Python one."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """``value`` must be one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def flag(name: str, value: Any) -> bool:
    """``value`` must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def flag_or_none(name: str, value: Any) -> bool | None:
    """``value`` must be True, False or None."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name}: expected True, False or None, got {value!r}")
    return value


def positive_int(name: str, value: Any) -> int:
    """``value`` must be an integer >= 1, NumPy's among them."""
    try:
        number = value if type(value) is int else operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if number < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value}")
    return number


def positive_float(name: str, value: Any) -> float:
    """``value`` must be a finite number > 0, NumPy's among them."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
    return number


def non_negative_float(name: str, value: Any) -> float:
    """As :func:`positive_float`, and 0 as well."""
    is_zero = isinstance(value, numbers.Real) and not isinstance(value, bool) and value == 0
    return 0.0 if is_zero else positive_float(name, value)


def mixing(name: str, value: Any) -> float:
    """``value`` must be a mixing factor in (0, 2]."""
    number = positive_float(name, value)
    if number > 2:
        raise ValueError(f"{name}: expected a mixing factor in (0, 2], got {value!r}")
    return number
