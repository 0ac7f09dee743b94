"""What can be seen of a given module or callable before it runs: its parts, what they do."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from deqfuse import checks
from deqfuse.torch_private import BATCH_NORMS

__all__ = [
    "check_modules",
    "modules_behind",
    "per_encoder",
    "refuse_scripted",
    "refusing_at_first",
    "takes_time_first",
    "uses_batch_statistics",
]


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether this module, by itself, normalises by statistics over the batch."""
    return isinstance(module, BATCH_NORMS) and (module.training or module.running_mean is None)


def takes_time_first(module: nn.Module) -> bool:
    """Whether a recurrent, attention or transformer layer says that its input is (T, B, d)."""
    if isinstance(module, nn.TransformerEncoder):
        module = module.layers[0]
    if isinstance(module, nn.TransformerEncoderLayer):
        module = module.self_attn
    known = isinstance(module, (nn.RNNBase, nn.MultiheadAttention))
    return known and not module.batch_first


def refuse_scripted(index: str, encoder: nn.Module, name: str) -> None:
    """Sites are reached by hooks, and what comes before is replaced: not in ``torch.jit``."""
    parts = encoder.modules() if name else [encoder]
    if any(isinstance(part, torch.jit.ScriptModule) for part in parts):
        raise TypeError(
            f"encoders{index}: expected modules that take hooks, got one of torch.jit (scripted or "
            "traced). Remedy: the module that it was made of; or, for a part of an encoder, "
            "the encoder's own input as the site"
        )


def modules_behind(f: Callable[..., Any]) -> list[nn.Module]:
    """Modules that a callable is, holds, closes over or names, as far as Python lets one see.

    Seen are bound methods, ``functools.partial``, attributes of callable objects, closures and
    globals of functions, and functions of the same file that those name. Some may never be called.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()
    pending: list[Any] = [f]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, functools.partial):
            pending += [value.func, *value.args, *value.keywords.values()]
        elif inspect.ismethod(value):
            pending += [value.__self__, value.__func__]
        elif inspect.isfunction(value):
            pending += [v for v in _named_by(value) if _looked_into(v, value)]
        elif isinstance(value, (list, tuple)):
            pending += [v for v in value if isinstance(v, nn.Module)]
        elif callable(value) and not inspect.isclass(value):
            held = getattr(value, "__dict__", {})
            pending += [v for v in held.values() if isinstance(v, nn.Module)]
    return found


def _named_by(function: Any) -> Iterator[Any]:
    """What a function closes over, and the globals that it reads."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            yield cell.cell_contents
    for instruction in dis.get_instructions(function):
        if instruction.opname == "LOAD_GLOBAL" and instruction.argval in function.__globals__:
            yield function.__globals__[instruction.argval]


def _looked_into(value: Any, function: Any) -> bool:
    """Modules, and functions of the same file; not the libraries that it calls."""
    if inspect.isfunction(value):
        return bool(value.__module__ == function.__module__)
    return isinstance(value, (nn.Module, functools.partial, list, tuple)) or inspect.ismethod(value)


def refusing_at_first(
    step: Callable[..., Any], modules: Callable[[], list[nn.Module]], name: str, remedy: str
) -> Callable[..., Any]:
    """``step``, whose first call refuses batch statistics of these modules and of their parts.

    Only a call shows that a module has a part in the map: a method of a model may use a few of its
    parts, and batch norm in front of an equilibrium is an ordinary layer.

    Args:
        step: a map whose rows must not depend on each other.
        modules: what it may call; asked for in the first call, as compilers cannot follow a look
            into code.
        name: of the map, as the error has it.
        remedy: what to do instead, as the error has it.

    Returns:
        A function like ``step``, whose first call may raise ``ValueError``.
    """
    looked_at = False

    def call(*args: Any) -> Any:
        nonlocal looked_at
        if looked_at:
            return step(*args)
        with _refusing_batch_statistics(modules(), name, remedy):
            out = step(*args)
        looked_at = True
        return out

    return call


@contextlib.contextmanager
def _refusing_batch_statistics(modules: list[nn.Module], name: str, remedy: str) -> Iterator[None]:
    def refuse(where: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            raise ValueError(
                f"{name}: expected rows that do not depend on each other, got "
                f"{type(module).__name__}{f' ({where})' if where else ''} with statistics over the "
                f"batch. Remedy: {remedy}"
            )

        return hook

    handles = [
        part.register_forward_pre_hook(refuse(where))
        for module in modules
        for where, part in module.named_modules()
        if uses_batch_statistics(part)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_modules(encoders: Any, fusion: Any, head: Any) -> None:
    """What ``ProFusion`` is made of must be modules."""
    if not isinstance(encoders, nn.ModuleList):
        checks.sequence("encoders", encoders, "modules")
    if not len(encoders):
        raise ValueError("encoders: expected at least one module, got none")
    named = [(f"encoders[{i}]", encoder) for i, encoder in enumerate(encoders)]
    named.append(("fusion", fusion))
    if head is not None:
        named.append(("head", head))
    for name, module in named:
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: expected a torch.nn.Module, got {type(module).__name__}")


def per_encoder(name: str, values: Any, count: int, of: str) -> Sequence[Any]:
    """One value per encoder, None where nothing is given."""
    if values is None:
        return [None] * count
    if isinstance(values, str):
        raise TypeError(f"{name}: expected a sequence of {of}, got {values!r}")
    checks.sequence(name, values, of)
    if len(values) != count:
        raise ValueError(
            f"{name}: expected {of}, one for each of {count} encoders, got {len(values)}"
        )
    return values
