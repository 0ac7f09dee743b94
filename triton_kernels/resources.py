"""Registers, shared memory and spills of every kernel, compiled for GPUs that need not be here.

The launchers themselves are run, but each launch is compiled instead, for the named target. So what
is measured is what a solve would launch. ``python -m deqfuse.triton_kernels.resources`` prints the
table of docs/kernels-gpu.md.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what compiled launches use as well

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deqfuse.triton_kernels.launch import Launch, intercept

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one block may have, in bytes (CUDA C++ programming guide; CDNA3's LDS).
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    kernel: str
    target: str
    registers: int
    spilled: int  # bytes of stack per thread
    shared: int  # bytes per block
    warps: int


def _type_of(value: Any, annotation: str) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    return annotation or ("fp32" if isinstance(value, float) else "i32")


def compile_launch(call: Launch, target: str) -> Resources:
    """Compile a launch for ``target`` and read what it takes from the binary."""
    kernel = call.kernel
    options = dict(call.options)
    given = dict(zip((p.name for p in kernel.params), call.args, strict=False))
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name] if parameter.name in given else options.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type_of(value, parameter.annotation_type)
        if isinstance(value, Tensor) and value.data_ptr() % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    registers, spilled = _usage(compiled)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return Resources(call.name, target, registers, spilled, shared, warps)


def _usage(compiled: Any) -> tuple[int, int]:
    """Registers per thread and bytes of stack."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = sum(int(n) for n in re.findall(r"; Num[VA]gprs: (\d+)", text))
        return registers, max(int(n) for n in re.findall(r"; ScratchSize: (\d+)", text))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if usage is None:
        raise RuntimeError(f"cuobjdump -res-usage: expected REG and STACK, got {report!r}")
    return int(usage[1]), int(usage[2])


def measure(run: Callable[[], Any], targets: Iterable[str]) -> list[Resources]:
    """Every launch of ``run`` compiled for every target; nothing is computed."""
    calls: list[Launch] = []
    with intercept(calls.append):
        run()
    return [compile_launch(call, target) for call in calls for target in targets]
