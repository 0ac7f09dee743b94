"""What the tests of Triton's kernels on a GPU share, and how they are rehearsed without one.

Under TRITON_INTERPRET=1 the same tests run on the CPU, in the interpreter, on small problems: what
they compute with is then known to run before a GPU is at hand. What only a device has (streams,
graphs, launches, synchronisations) is replaced by nothing there, or the test is skipped.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from parameters import scatter_norms
from torch.overrides import TorchFunctionMode

from deqfuse import Anderson, DEQFusion
from deqfuse.backends import BACKENDS, cuda, cuda_native, reference
from deqfuse.backends.maps import PAPER

REHEARSAL = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
MARK = pytest.mark.triton if REHEARSAL else pytest.mark.gpu
LARGE = pytest.mark.triton if REHEARSAL else pytest.mark.slow
on_device = pytest.mark.skipif(REHEARSAL, reason="about the device itself")

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}


def whole() -> tuple[int, int]:
    """Dimension and groups of the widest solve that is one launch on this device."""
    if REHEARSAL or not torch.cuda.is_available():
        return 12, 3
    wide = cuda.one_launch(torch.empty(0, 128, device=DEVICE), 4, Anderson())
    return (128, 4) if wide else (64, 4)  # the latter with 99 KB of shared memory a block


# Dimension and groups: what one program solves, and what takes steps.
WHOLE, STEPPED = whole(), (81, 9) if REHEARSAL else (300, 4)
# The interpreter takes its time over steps; CI rehearses the rest.
LONG_REHEARSAL = pytest.mark.slow if REHEARSAL else pytest.mark.gpu
WIDE = pytest.param(*STEPPED, marks=LONG_REHEARSAL, id="stepped")
WIDTHS = (
    (WHOLE, WIDE)
    if REHEARSAL
    else ((50, 2), (64, 4), (128, 4), (256, 4), (300, 4), (512, 4), (1000, 4), (1024, 4), (1024, 1))
)
NAMES = ("f32", "bf16") if REHEARSAL else tuple(DTYPES)
ROWS, CELLS = (6, 1) if REHEARSAL else (77, 3)
REPEATS = 1 if REHEARSAL else 100
# Enough evaluations for a rehearsal; steps are launched to the last one, wanted or not.
OPTIONS = {"max_iter": 16, "m": 2} if REHEARSAL else {}
PATHS = pytest.mark.parametrize(("dim", "groups"), [pytest.param(*WHOLE, id="whole"), WIDE])


@pytest.fixture(autouse=REHEARSAL)
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cuda backend takes tensors on the CPU, without the CUDA library."""
    monkeypatch.setenv("DEQFUSE_BACKEND", "cuda")
    rehearsed = dataclasses.replace(
        cuda.BACKEND,
        unavailable=lambda: None,
        refuses=cuda.refuses_problem,
        takes_rows=lambda z0, solver: True,
    )
    monkeypatch.setitem(BACKENDS, "cuda", rehearsed)
    monkeypatch.setattr(cuda_native, "load_error", lambda: "not in a rehearsal")


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def anderson(**options: Any) -> Anderson:
    return Anderson(**OPTIONS | options)


def layer_of(dim: int, groups: int, n: int, dtype: torch.dtype, seed: int = 0) -> DEQFusion:
    """A layer on the device, whose norms are away from their initial values."""
    torch.manual_seed(seed)
    layer = DEQFusion(dim, n, num_groups=groups, solver=anderson()).requires_grad_(False)
    scatter_norms(layer)
    return layer.to(DEVICE, dtype)


def solves(
    dim: int,
    groups: int,
    *,
    rows: int = ROWS,
    n: int = CELLS,
    dtype: str = "f32",
    backend: Any = cuda,
    seed: int = 0,
) -> list[functools.partial]:
    """Both solves of a layer, the second with dropout's mask, as functions of the solver."""
    stored = DTYPES[dtype]
    layer = layer_of(dim, groups, n, stored, seed)
    x = torch.randn(n, rows, dim).to(DEVICE, stored)
    cell_sum = torch.randn(rows, dim).to(DEVICE, reference.compute_dtype(stored))
    mask = (2.0 * (torch.rand(rows, dim) > 0.5)).to(x)
    flat = [t for part in layer.cells for t in part.flat()]
    rest = (groups, PAPER)
    fuse = (x.sum(0), cell_sum, layer.combine.flat(), mask, None, n)
    return [
        functools.partial(backend.solve_cells, x, flat, None, *rest),
        functools.partial(backend.solve_fuse, *fuse, *rest),
    ]


def assert_as_good_as_torch(given: list[torch.Tensor], reference) -> None:
    """Each output errs at most 8 times as much as PyTorch in the same precision, or rounding."""
    dtype = given[0].dtype
    truth, other = reference(torch.float64), reference(dtype)
    assert len(given) == len(truth)
    for i, (mine, wanted, torchs) in enumerate(zip(given, truth, other, strict=True)):
        error, scale = (mine - wanted).norm(), torch.finfo(dtype).eps * wanted.norm()
        limit = 8 * scale if dtype == torch.float64 else 8 * (torchs - wanted).norm() + scale
        assert error <= limit, (i, error / scale)


class _Relus(TorchFunctionMode):
    """What the relus are given."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.relu:
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))


def rows_off_kinks(run: Callable[[], Any], margin: float) -> torch.Tensor:
    """Which rows have no number within ``margin`` of a relu's kink while ``run`` is evaluated.

    Rounding may turn its sign there, and a gradient with it.
    """
    with _Relus() as relus:
        run()
    off = [t.abs().gt(margin).all(-1) for t in relus.inputs]  # (rows,) or (N, rows)
    kept = torch.cat([o.reshape(-1, o.shape[-1]) for o in off]).all(0)
    assert 2 * kept.sum() > len(kept)
    return kept


def in_float64(value: Any) -> Any:
    if isinstance(value, list):
        return [in_float64(v) for v in value]
    return value.double() if isinstance(value, torch.Tensor) else value


def synchronize() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whatever would make the host wait for the device raises."""
    if REHEARSAL:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def streams(count: int) -> list[Callable[[], AbstractContextManager[Any]]]:
    """What enters each of ``count`` new streams."""
    if REHEARSAL:
        return [nullcontext] * count
    return [functools.partial(torch.cuda.stream, torch.cuda.Stream()) for _ in range(count)]


def captured(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """What ``run`` returned while it was captured in a CUDA graph, and the graph's replay."""
    if REHEARSAL:
        given = run()

        def again() -> None:
            for mine, other in zip(tensors(given), tensors(run()), strict=True):
                mine.copy_(other)

        return given, again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = run()
    return given, graph.replay


def tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def profiled(run: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """What the device did in ``run``, and which calls of the CUDA runtime the host made."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        with torch.profiler.record_function("the run"):
            run()
        synchronize()
    events = profile.events()
    on_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    span = next(e.time_range for e in on_host if e.name == "the run")
    done = [
        e.name
        for e in events
        if e.device_type == torch.autograd.DeviceType.CUDA and e.name != "the run"
    ]
    calls = [
        e.name
        for e in on_host
        if re.match("cu(da)?[A-Z]", e.name) and span.start <= e.time_range.start <= span.end
    ]
    return done, calls


def needs_memory(gigabytes: int) -> None:
    """Skips the test on a smaller device."""
    if not REHEARSAL and torch.cuda.get_device_properties(0).total_memory < gigabytes << 30:
        pytest.skip(f"needs a GPU with {gigabytes} GiB")
