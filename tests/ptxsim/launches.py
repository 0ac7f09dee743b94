"""Launches of Triton kernels, compiled to PTX (no ptxas) and run by the emulator.

Import this before anything that imports triton, and without TRITON_INTERPRET: kernels are compiled.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import emulator

os.environ.setdefault("TRITON_CACHE_DIR", str(emulator.BUILD / "triton"))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as on a GPU

import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

CACHE = Path(os.environ["TRITON_CACHE_DIR"])
TARGET = GPUTarget("cuda", int(os.environ.get("PTXSIM_ARCH", "80")), 32)
POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16",
    torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8",
    torch.bool: "*i1",
}  # fmt: skip

found: list[dict] = []  # all findings so far
launched: Counter = Counter()
texts: dict[str, str] = {}  # PTX by kernel, the last that was compiled
change: Callable[[str, str], str] = lambda name, text: text  # of PTX before it is loaded  # noqa: E731
_compiled: dict[Any, Any] = {}
_seeds = [emulator.SEED]


def _ptx_only(add_stages: Any) -> Any:
    """Compilation ends with PTX: ptxas would take most of the time."""

    def add(self: Any, stages: dict, *rest: Any) -> None:
        add_stages(self, stages, *rest)
        stages.pop("cubin")

    return add


def _named_ptx(init: Any) -> Any:
    def make(self: Any, *rest: Any) -> None:
        init(self, *rest)
        self.binary_ext = "ptx"

    return make


nvidia.CUDABackend.add_stages = _ptx_only(nvidia.CUDABackend.add_stages)
nvidia.CUDABackend.__init__ = _named_ptx(nvidia.CUDABackend.__init__)


def reseed(seed: int) -> None:
    """Launches from here on take this order of warps; its lowest bit also that of lanes."""
    _seeds[0] = seed


def forget() -> None:
    """Compile anew, after ``change`` has been changed."""
    _compiled.clear()


def compiled(kernel: Any, args: Sequence[Any], options: dict) -> tuple[Any, list]:
    """(module, kernel name, shared bytes, warps, layout) and the parameters of this launch."""
    options = dict(options)
    given = dict(zip((p.name for p in kernel.params), args, strict=False))
    signature, constants, attributes, runtime = {}, {}, {}, []
    for i, p in enumerate(kernel.params):
        value = given[p.name] if p.name in given else options.pop(p.name)
        known = isinstance(value, int) and value == 1 and not p.do_not_specialize
        if p.is_constexpr or value is None or known:
            signature[p.name], constants[p.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            kind = POINTERS[value.dtype]
            aligned = not p.do_not_specialize_on_alignment and value.data_ptr() % 16 == 0
        else:
            kind = p.annotation_type or ("fp32" if isinstance(value, float) else "i32")
            aligned = isinstance(value, int) and not p.do_not_specialize and value % 16 == 0
        signature[p.name] = kind
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
        runtime.append((p.name, kind, value))
    key = (kernel.fn.__module__, kernel.fn.__name__, *map(str, (signature, constants, attributes)))
    key += (str(options),)
    if key not in _compiled:
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        made = triton.compile(source, target=TARGET, options=options)
        text = made.asm["ptx"]
        text = text.decode() if isinstance(text, bytes) else text
        name = made.metadata.name
        texts[name] = text
        module = emulator.load(change(name, text))
        layout = emulator.kernels(module)[name]
        _compiled[key] = module, name, made.metadata.shared, made.metadata.num_warps, layout
    return _compiled[key], runtime


def regions(tensors: Sequence[tuple[str, torch.Tensor]]) -> Callable[[torch.Tensor], int]:
    """Registers the tensors, each in a space of its own; overlapping ones share it.

    Returns:
        tensor -> its address as the kernel sees it.
    """
    emulator.lib.sim_clear_regions()
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), min(t.element_size(), 4), name)
        for name, t in tensors
        if t.numel()
    )
    merged: list[list] = []
    for begin, end, granule, name in spans:
        if merged and begin < merged[-1][1]:
            last = merged[-1]
            last[1], last[2] = max(last[1], end), min(last[2], granule)
            last[3] += f"/{name}"
        else:
            merged.append([begin, end, granule, name])
    places = []
    for k, (begin, end, granule, name) in enumerate(merged):
        base = ((k + 1) << 40) + (begin & 0xFFF)
        emulator.lib.sim_region(base, begin, end - begin, granule, name.encode())
        places.append((begin, end, base))

    def address(t: torch.Tensor) -> int:
        p = t.data_ptr()
        return next((base + p - a for a, b, base in places if a <= p < b), p)

    return address


FORMATS = {"fp64": "<d", "fp32": "<f"}


def run(kernel: Any, grid: Sequence[int], args: Sequence[Any], options: dict) -> None:
    """One launch; findings are added to ``found``."""
    (module, name, shared, warps, layout), runtime = compiled(kernel, args, options)
    for _, _, value in runtime:
        if isinstance(value, torch.Tensor):
            assert value.is_contiguous() or value.numel() == 0, "a kernel was given strides"
    address = regions([(n, v) for n, _, v in runtime if isinstance(v, torch.Tensor)])
    params = bytearray(max((at + size for at, size in layout), default=0))
    for (_, kind, value), (at, size) in zip(runtime, layout, strict=False):
        if kind.startswith("*"):
            struct.pack_into("<Q", params, at, address(value))
        else:
            struct.pack_into(FORMATS.get(kind, "<i" if size == 4 else "<q"), params, at, value)
    Unwritten.expire()
    _seeds[0] += 1
    emulator.launch(module, name, grid, 32 * warps, shared, bytes(params), seed=_seeds[0])
    launched[name] += 1
    found.extend(emulator.reports())


def handler(call: Any) -> None:
    """For ``deqfuse.triton_kernels.launch.intercept``."""
    run(call.kernel, call.grid, call.args, call.options)


class Unwritten(TorchDispatchMode):
    """What torch allocates without writing it is known to the emulator as never written."""

    known: ClassVar[dict[int, StorageWeakRef]] = {}
    EMPTY: ClassVar[set[str]] = {
        "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
    }  # fmt: skip

    @classmethod
    def expire(cls) -> None:
        for p in [p for p, reference in cls.known.items() if reference.expired()]:
            emulator.lib.sim_forget(p)
            del cls.known[p]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if _is_here(t)]
        if func.overloadpacket.__name__ in self.EMPTY:
            for t in outs:
                storage = t.untyped_storage()
                emulator.lib.sim_poison(storage.data_ptr(), storage.nbytes())
                self.known[storage.data_ptr()] = StorageWeakRef(storage)
        elif func.namespace != "ptxsim":
            schema = func._schema
            given = dict(zip((a.name for a in schema.arguments), args, strict=False))
            for a in schema.arguments:
                value = (given | (kwargs or {})).get(a.name)
                if a.alias_info is not None and a.alias_info.is_write and _is_here(value):
                    self.clean(value)
            for returned, t in zip(schema.returns, outs, strict=False):
                if returned.alias_info is None:
                    self.clean(t)
        return out

    @staticmethod
    def clean(t: torch.Tensor) -> None:
        if t.is_contiguous():
            emulator.lib.sim_clean(t.data_ptr(), t.numel() * t.element_size())
        else:
            storage = t.untyped_storage()
            emulator.lib.sim_clean(storage.data_ptr(), storage.nbytes())


def _is_here(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.numel() > 0
