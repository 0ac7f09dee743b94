"""Registers, shared memory and spills of every kernel, compiled for GPUs that need not be here.

The launchers themselves are run, but each launch is compiled instead, for the named target. So what
is measured is what a solve would launch. docs/explanation/kernels-gpu-resources.md is what
``python -m deqfuse.triton_kernels.resources --set full --markdown`` prints. Not under
TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
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

from deqfuse.triton_kernels import (
    anderson,
    cell,
    cell_penalty,
    cell_vjp,
    fuse,
    fuse_penalty,
    fuse_vjp,
    solve,
    tiles,
    unit,
)
from deqfuse.triton_kernels.launch import Launch, intercept
from deqfuse.triton_kernels.resource_table import SHARED, markdown

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
}
# Consumer cards, with less shared memory: one size of each kind is compiled for them.
SAMPLED = ("sm_86", "sm_89", "sm_120")
SAMPLE = {"step": 128, "solve": 50, "penalty": 128, "anderson": 512, "unit": 512}
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


def is_aligned(value: Any, parameter: Any) -> bool:
    """Whether Triton compiles an argument as a multiple of 16 (bytes, if it is a tensor)."""
    if isinstance(value, Tensor):
        return not parameter.do_not_specialize_on_alignment and value.data_ptr() % 16 == 0
    return isinstance(value, int) and not parameter.do_not_specialize and value % 16 == 0


def compile_launch(call: Launch, target: str) -> Resources:
    """Compile a launch for ``target`` and read what it takes from the binary."""
    kernel = call.kernel
    options = dict(call.options)
    if TARGETS[target].backend == "hip":
        options = tiles.amd_options(options)
    given = dict(zip((p.name for p in kernel.params), call.args, strict=False))
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name] if parameter.name in given else options.pop(parameter.name)
        known = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or known:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type_of(value, parameter.annotation_type)
        if is_aligned(value, parameter):
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


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the kernels are compiled for.

    ``released`` has skip, relu_last and a dropout mask; with ``absent``, rows lack modalities.
    """

    kind: str  # "step", "penalty", "anderson", "unit" or "solve"
    dim: int
    groups: int = 4
    dtype: str = "float32"
    precision: str = "ieee"
    m: int = 5
    released: bool = True
    absent: bool = False

    def shipped(self, target: str) -> bool:
        """Whether it is compiled there: not where steps take the place of a solve.

        For some targets no more than a sample is.
        """
        if target in SAMPLED and (self.dim != SAMPLE[self.kind] or self.dtype != "float32"):
            return False
        dtype = getattr(torch, self.dtype)
        return self.kind != "solve" or tiles.fits_solve(
            self.dim, self.groups, dtype, self.m, SHARED[target]
        )

    def run(self) -> None:
        """Launch all kernels of the kind, on one tile of zeros."""
        torch.backends.cuda.matmul.fp32_precision = self.precision
        dtype, d, g = getattr(torch, self.dtype), self.dim, self.groups
        state = torch.float64 if dtype == torch.float64 else torch.float32
        z, x = torch.zeros(2, 16, d, dtype=state), torch.zeros(2, 16, d, dtype=dtype)
        if self.kind == "anderson":
            rows = anderson.AndersonState(z[0], self.m, steps=3)
            options = {"tol": 1e-4, "max_iter": 50, "beta": 0.5 if self.released else 1.0}
            anderson.anderson_step(z[0], rows, 0, lam=1e-6, **options)
            return
        if self.kind == "unit":
            for grad in (None, x[1]):
                unit.unit_size(x[0], grad)
            return
        packed = x.new_zeros(2 * cell.packed_size(d))
        square, vector = x.new_zeros(d, d), x.new_zeros(d)
        params = [square, vector, square, vector, vector, vector]
        active = torch.ones(2, 16, dtype=torch.bool)
        mask = x[0] if self.released else None
        present, counts = (active, z.new_ones(16)) if self.absent else (None, None)
        if self.kind == "solve":
            knobs = tiles.Knobs(1e-4, 50, self.m, 0.5 if self.released else 1.0, 1e-6)
            z0 = z if self.released else None
            start = None if z0 is None else z0[0]
            weights, bias = vector[:2], vector[2] if self.released else None
            rest = (g, self.released, self.released, knobs)
            solve.solve_layer(x, packed, params, weights, bias, mask, start, z0, *rest, present)
            solve.solve_fuse(x[0], z[0], params, mask, start, 2, g, self.released, knobs, counts)
            return
        if self.kind == "penalty":
            operands, how = (z[0], x[0], z[0], mask, 2, params), (g, self.released, True)
            for count in (1, 3):  # a probe is the only one, the first, the last, or none of these
                probes = z.new_zeros(count, *z.shape)
                cell_penalty.residual_cell_penalty(probes, z, x, packed, *how)
                fuse_penalty.purify_combine_penalty(probes[:, 0], *operands, *how, counts)
            return
        cell.residual_cell(z, x, packed, g, self.released, active=active)
        cell_vjp.residual_cell_vjp(z, z, x, packed, g, self.released)
        constant = fuse.gate_constant(z[0], 2, params, g, state, counts=counts)
        fused = (2, params, g, self.released)
        fuse.purify_combine(z[0], x[0], constant, mask, *fused, active=active[0], counts=counts)
        fuse_vjp.purify_combine_vjp(z[0], z[0], x[0], z[0], mask, *fused, counts=counts)


GROUPS = {32: 4, 50: 2, 64: 4, 128: 4, 256: 4, 300: 4, 500: 4, 512: 4, 768: 4, 1000: 4, 1024: 4}
HUGE = ((512, 1), (768, 1), (1000, 1), (1000, 2), (1024, 1), (1024, 2))  # groups wider than 256
SMALL = [
    Problem(kind, dim, groups, precision=precision, released=released)
    for kind, dim, groups, precision in (
        ("step", 128, 4, "tf32"),
        ("step", 300, 4, "ieee"),
        ("step", 1024, 1, "tf32"),
        ("solve", 50, 2, "ieee"),
        ("solve", 128, 4, "tf32"),
        ("anderson", 512, 4, "ieee"),
        ("unit", 512, 4, "ieee"),
    )
    for released in (False, True)
]
PENALTIES = [  # one of each kind of tile
    Problem("penalty", 128, 4, precision="tf32"),
    Problem("penalty", 300, 4),
    Problem("penalty", 1024, 1, precision="tf32"),
]
ABSENT = [  # rows that lack modalities, one of each kind
    Problem(kind, 128, 4, precision="tf32", absent=True) for kind in ("step", "solve", "penalty")
]
SMALL += [Problem("step", 1024, 1, "float64"), *PENALTIES, *ABSENT]
FULL = [
    *(
        Problem("step", d, g, precision=p, released=r)
        for d, g in GROUPS.items()
        for p in ("tf32", "ieee")
        for r in (False, True)
    ),
    *(
        Problem("solve", d, GROUPS[d], precision=p, m=m, released=r)
        for d in (32, 50, 64, 128)
        for p in ("tf32", "ieee")
        for m in (1, 3, 5)
        for r in (False, True)
    ),
    *(Problem("step", d, g, "float64") for d, g in GROUPS.items()),
    *(
        Problem("step", d, GROUPS[d], t, p)
        for d in (50, 128, 300, 512)
        for t in ("bfloat16", "float16")
        for p in ("tf32", "ieee")
    ),
    *(
        Problem("anderson", d, dtype=t, m=m, released=r)
        for d in (50, 512, 4000)
        for t in ("float32", "float64")
        for m in range(1, 9)
        for r in (False, True)
    ),
    *(
        Problem("step", d, g, precision=p, released=r)
        for d, g in HUGE
        for p in ("tf32", "ieee")
        for r in (False, True)
    ),
    *(Problem("step", d, g, "float64") for d, g in HUGE),
    *(
        Problem("step", d, 1, t, p)
        for d in (512, 1024)
        for t in ("bfloat16", "float16")
        for p in ("tf32", "ieee")
    ),
    *PENALTIES,
    *(
        Problem("unit", d, dtype=t)
        for d in (50, 512, 4000)
        for t in ("float32", "float64", "bfloat16")
    ),
    *ABSENT,
]


def _measure(problem: Problem, targets: list[str]) -> list[Resources]:
    return measure(problem.run, [target for target in targets if problem.shipped(target)])


def measure_all(
    problems: list[Problem], targets: list[str], jobs: int
) -> list[tuple[Problem, Resources]]:
    """Compile what is shipped in ``jobs`` processes."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        found = pool.map(_measure, problems, [targets] * len(problems))
        return [(p, r) for p, results in zip(problems, found, strict=True) for r in results]


def main() -> None:
    """Compile a set of problems; print JSON, one kernel a line, or a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=("small", "full"), default="small")
    parser.add_argument("--targets", default=",".join(TARGETS), help="some of %(default)s")
    parser.add_argument("--markdown", action="store_true", help="a table instead of JSON lines")
    parser.add_argument("--kind", help="only problems of this kind")
    parser.add_argument("--dim", type=int, help="only problems of this width")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    problems = [
        p
        for p in (SMALL if args.set == "small" else FULL)
        if args.kind in (None, p.kind) and args.dim in (None, p.dim)
    ]
    targets = args.targets.split(",")
    entries = [
        {**dataclasses.asdict(problem), **dataclasses.asdict(resources)}
        for problem, resources in measure_all(problems, targets, args.jobs)
    ]
    for line in [markdown(entries, targets)] if args.markdown else map(json.dumps, entries):
        print(line)


if __name__ == "__main__":
    main()
