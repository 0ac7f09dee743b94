"""Argument checks. Each message names the argument, what was expected, what came, the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deqfuse.reporting import ON_FAILURE
from deqfuse.scalars import flag as flag
from deqfuse.scalars import one_of as one_of
from deqfuse.scalars import positive_float as positive_float
from deqfuse.scalars import positive_int as positive_int
from deqfuse.solvers.options import GradientOption, Unrolled
from deqfuse.solvers.solve import registered

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sequence(name: str, value: Any, of: str) -> None:
    """``value`` must have a length and an order."""
    if not isinstance(value, Sequence):
        remedy = ""  # the value itself may be megabytes of numbers
        if isinstance(value, Mapping):
            remedy = f". Remedy: list({name}.values())"
        elif isinstance(value, Iterable):
            remedy = f". Remedy: list({name})"
        raise TypeError(f"{name}: expected a sequence of {of}, got {type(value).__name__}{remedy}")


def groups(dim: int, num_groups: int) -> None:
    """``num_groups`` must divide ``dim``."""
    positive_int("dim", dim)
    positive_int("num_groups", num_groups)
    if dim % num_groups:
        # Not dim itself: GroupNorm over single features is constant.
        fitting = [g for g in range(1, max(dim // 2, 1) + 1) if dim % g == 0][:8]
        raise ValueError(
            f"num_groups: expected a divisor of dim={dim}, got {num_groups}. "
            f"Remedy: choose one of {fitting}..."
        )


def options(solver: Any, adjoint: Any, on_failure: Any) -> None:
    """The solver, gradient and failure options must be of their types and go together."""
    registered(solver)
    if not isinstance(adjoint, GradientOption):
        raise TypeError(
            "adjoint: expected Implicit(...), OneStep(), Neumann(...) or Unrolled(), "
            f"got {adjoint!r}"
        )
    if isinstance(adjoint, Unrolled) and not solver.unrolls:
        raise ValueError(
            "adjoint: Unrolled() backpropagates through the solver's steps; autograd cannot follow "
            f"those of {solver!r}. Remedy: Implicit(), or Anderson(), Picard() or Broyden()."
        )
    one_of("on_failure", on_failure, ON_FAILURE)


def tensor(name: str, value: Any, like: Tensor | None = None) -> None:
    """``value`` must be a floating-point tensor, of the dtype and device of ``like`` when given."""
    if not isinstance(value, Tensor):
        not_symbolic(name, value)
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind, remedy = f"layout {value.layout}", f"{name}.to_dense()"
        if value.is_nested:
            kind, remedy = "a nested one", f"torch.nested.to_padded_tensor({name}, 0.0)"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}. Remedy: {remedy}")
    if value.dtype not in FLOATING:
        remedy = "complex maps are not supported" if value.is_complex() else f"{name}.float()"
        raise TypeError(
            f"{name}: expected a floating-point dtype (float16, bfloat16, float32 or float64), got "
            f"{value.dtype}. Remedy: {remedy}"
        )
    if like is None:
        return
    device(name, value, like)
    if value.dtype != like.dtype and not torch.is_autocast_enabled(value.device.type):
        raise TypeError(
            f"{name}: expected dtype {like.dtype} like the other tensors, got {value.dtype}. "
            f"Remedy: {name}.to({like.dtype}), or convert the module"
        )


def not_symbolic(name: str, *values: Any) -> None:
    """``torch.fx`` runs a forward on stand-ins; one that looks at its inputs cannot take them."""
    if any(type(value).__module__ == "torch.fx.proxy" for value in values):
        raise TypeError(
            f"{name}: expected a torch.Tensor, got a Proxy of torch.fx. Remedy: a Tracer whose "
            "is_leaf_module() is true for deqfuse's modules; docs/how-to/compile.md has one"
        )


def not_traced() -> None:
    """``torch.jit.trace`` would write down the steps of one solve, for data of any difficulty."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise NotImplementedError(
            "deqfuse: torch.jit.trace (and the ONNX exporter on top of it) is not supported: it "
            "records the steps of one solve, and other data need others. Remedy: "
            "torch.export.export, which keeps the solve as one operator (docs/how-to/compile.md)"
        )


def device(name: str, value: Tensor, like: Tensor) -> None:
    """``value`` must lie where ``like`` does."""
    if value.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} like the other tensors, got {value.device}. "
            f"Remedy: {name}.to({str(like.device)!r})"
        )


def operand(name: str, value: Any, like: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """A further tensor of a solve: any floating dtype (it is cast), this device, this shape."""
    tensor(name, value)
    device(name, value, like)
    shape(name, value, expected, meaning)


def present(name: str, value: Any, like: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """What a row has: a bool tensor of this shape on the device of ``like``."""
    _of_dtype(name, value, like, expected, meaning, torch.bool)


def counts(name: str, value: Any, like: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """How much of something a row has: an int64 tensor of this shape on this device."""
    _of_dtype(name, value, like, expected, meaning, torch.int64)


def _of_dtype(
    name: str,
    value: Any,
    like: Tensor,
    expected: tuple[int, ...],
    meaning: str,
    dtype: torch.dtype,
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor of {dtype}, got {type(value).__name__}. "
            f"Remedy: torch.as_tensor({name}, dtype={dtype})"
        )
    if value.dtype is not dtype:
        raise TypeError(f"{name}: expected {dtype}, got {value.dtype}. Remedy: {name}.to({dtype})")
    if value.layout is not torch.strided:
        raise TypeError(
            f"{name}: expected a dense tensor, got {value.layout}. Remedy: {name}.to_dense()"
        )
    device(name, value, like)
    shape(name, value, expected, meaning)


def parameters(values: Sequence[Any], like: Tensor, matrices: int, vectors: int) -> None:
    """Weights in operator order: pairs (d, d) and (d,) first, then vectors (d,), repeated."""
    d = like.shape[-1]
    shapes = [(d, d), (d,)] * matrices + [(d,)] * vectors
    where = like.device
    for i, value in enumerate(values):
        expected = shapes[i % len(shapes)]
        try:  # the common case at a quarter of the cost: a layer has dozens of these
            if value.shape == expected and value.device == where and value.dtype in FLOATING:
                continue
        except AttributeError:
            pass
        operand(f"params[{i}]", value, like, expected, "the shape for dim = d")


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """``value`` must have exactly this shape; ``meaning`` names the dimensions."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} = {meaning}, got {tuple(value.shape)}"
        )
