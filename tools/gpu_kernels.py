"""Run every kernel once at a small size and compare with the reference: what sanitizers look at.

    python -m tools.gpu_kernels                       # on a GPU
    TRITON_INTERPRET=1 python -m tools.gpu_kernels    # without: interpreter and host policy

The first run on a machine compiles the Triton kernels; later ones find them in Triton's cache.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqfuse import Anderson, DEQFusion, Implicit, operators
from deqfuse.backends import Backend, cpu_native, cuda, cuda_native, reference
from deqfuse.backends.arguments import adjoint_numbers
from deqfuse.backends.maps import PAPER
from deqfuse.backends.problem import compute_dtype

ROWS, MODALITIES, TOL = 21, 2, 1e-4  # rows: a whole tile and a ragged one
EXACT = Anderson(tol=1e-11, max_iter=200)
CUTS = ("resident", "streamed", "steps")
# By dtype: features and groups for whole solves (float64: whole-row steps), and for wide steps.
FORWARD = {
    torch.float32: ((32, 4), (50, 2), (128, 4), (100, 20)),
    torch.bfloat16: ((32, 4), (100, 20)),
    torch.float16: ((32, 4),),
    torch.float64: ((32, 4), (100, 20)),
}
# Features that the CUDA adjoint cuts in these ways on every architecture from sm_80 on.
ADJOINT = {torch.float32: (32, 200, 300), torch.float64: (32, 128, 300)}


class Operands(NamedTuple):
    """A layer's blocks as the backends take them."""

    x: Tensor  # (N, B, d)
    x_fuse: Tensor  # (B, d)
    cells: list[Tensor]
    fuse: list[Tensor]
    mask: Tensor  # (B, d)
    cell_sum: Tensor  # (B, d)
    cotangent: Tensor  # (N, B, d)
    groups: int

    def exact(self) -> Operands:
        """In float64 on the CPU: sanitizers are to look at our kernels only."""
        return Operands(*map(_exact, self))


def _exact(value: Any) -> Any:
    if isinstance(value, list):
        return [_exact(t) for t in value]
    return value.cpu().double() if isinstance(value, Tensor) else value


def operands(dim: int, groups: int, dtype: torch.dtype, device: str) -> Operands:
    """Drawn from a seed; all that must not be zero is not."""
    torch.manual_seed(dim)
    layer = DEQFusion(dim, MODALITIES, num_groups=groups).requires_grad_(False).to(device, dtype)
    assert layer.combine is not None
    x, state, cotangent = torch.randn(3, MODALITIES, ROWS, dim)
    kept = 2.0 * (torch.rand(ROWS, dim) > 0.5)
    compute = compute_dtype(dtype)
    return Operands(
        x=x.to(device, dtype),
        x_fuse=x.sum(0).to(device, dtype),
        cells=[t for cell in layer.cells for t in cell.flat()],  # type: ignore[operator]
        fuse=layer.combine.flat(),
        mask=kept.to(device, dtype),
        cell_sum=state[0].to(device, compute),
        cotangent=cotangent.to(device, compute),
        groups=groups,
    )


def forward(backend: Backend, given: Operands, solver: Anderson) -> list[Tensor]:
    """Equilibria of the cells, then of the fuse step with a mask."""
    x, x_fuse, cells, fuse, mask, cell_sum, _, groups = given
    found = [
        backend.cells.solve(x, cells, None, groups, PAPER, solver),
        backend.fuse.solve(x_fuse, cell_sum, fuse, mask, None, MODALITIES, groups, PAPER, solver),
    ]
    return [solved.z for solved in found]


def adjoint(
    backend: Backend, given: Operands, z: Sequence[Tensor], option: Implicit
) -> list[Tensor]:
    """Gradients of inputs and parameters through both blocks."""
    x, x_fuse, cells, fuse, mask, cell_sum, g, groups = given
    dx, flat, _ = backend.cells.adjoint(g, z[0], x, cells, groups, PAPER, option, True)
    how = (MODALITIES, groups, PAPER, option, True)
    dx_fuse, dsum, params, _ = backend.fuse.adjoint(g[0], z[1], x_fuse, cell_sum, fuse, mask, *how)
    return [dx, *flat, dx_fuse, dsum, *params]


def penalty(backend: Backend, given: Operands, z: Sequence[Tensor]) -> list[Tensor]:
    """Jacobian penalty per row and its gradients; two probes, the same ones for every backend."""
    x, _, cells, fuse, mask, _, _, groups = given
    states = torch.cat([z[0], z[1][None]])
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(2, *states.shape, generator=generator, dtype=torch.float64).to(states)
    weights = torch.ones(len(x), dtype=x.dtype, device=x.device)
    rows, dx, grads = backend.penalty(
        probes, states, list(x), [*cells, *fuse, weights], mask, groups, PAPER, True
    )
    # The last norms' biases have none.
    return [rows, *dx, *(g for g in grads if g.any())]


def units(given: Operands) -> list[Tensor]:
    """Injections of unit size and their gradients, by the kernels."""
    x = list(given.x)
    return [*cuda.unit_size(x, []), *cuda.unit_size(x, list(given.cotangent))]


def exact_units(given: Operands) -> list[Tensor]:
    """The same by torch's operations and autograd."""
    x = [t.requires_grad_() for t in given.x]
    y = operators.unit_size(x, "reference")
    return [*(t.detach() for t in y), *torch.autograd.grad(y, x, list(given.cotangent))]


def _library_cells(*given: Any) -> Any:
    *tensors, groups, _, option, want = given
    how = (groups, False, *adjoint_numbers(option), _tf32())
    dx, grads, *rest = cuda_native.adjoint_cells(*tensors, want, *how)
    return dx, grads, rest


def _library_fuse(*given: Any) -> Any:
    *tensors, mask, modalities, groups, _, option, want = given
    how = (modalities, groups, False, *adjoint_numbers(option), _tf32())
    dx, dsum, grads, *rest = cuda_native.adjoint_fuse(*tensors, want, mask, *how)
    return dx, dsum, grads, rest


# Adjoints by the CUDA library, whatever `cuda` would choose; on the CPU the host policy's.
LIBRARY = dataclasses.replace(
    cuda.BACKEND,
    cells=cuda.BACKEND.cells._replace(adjoint=_library_cells),
    fuse=cuda.BACKEND.fuse._replace(adjoint=_library_fuse),
)


def _tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def error(run: Callable[[], list[Tensor]], truth: Sequence[Tensor]) -> float:
    """The largest relative error of a tensor, NaN if there is one."""
    errors = [
        (mine.cpu().double() - wanted).norm() / wanted.norm()
        for mine, wanted in zip(run(), truth, strict=True)
    ]
    return float(torch.stack(errors).max())


def runs(device: str) -> Iterator[tuple[str, Callable[[], float], float]]:
    """Name, a run that returns its error, and how large that may be.

    An error is at most residual / (1 - contraction); weights before a cell's first norm have
    gradients of a thousandth of the others', so that their relative error may be larger.
    """
    tight = Implicit(tol=1e-11, max_iter=200)
    # Rounding to TF32 turns the sign of a relu now and then: emulated, 1.3e-2 at d = 300.
    backward = 1000 * TOL if _tf32() else 100 * TOL
    for dtype in FORWARD:
        if dtype is torch.float64 and _tf32():
            continue  # the same again; a second solve of a kind would be captured as a graph
        sizes = [(dim, groups, "") for dim, groups in FORWARD[dtype]]
        cuts = zip(ADJOINT.get(dtype, ()), CUTS, strict=False)
        for dim, groups, cut in [*sizes, *((dim, 4, cut) for dim, cut in cuts)]:
            given, name = operands(dim, groups, dtype, device), f"{dtype} d={dim} {cut}"[6:]
            truth = forward(reference.BACKEND, given.exact(), EXACT)
            if not cut:
                solve = functools.partial(
                    forward, cuda.BACKEND, given, Anderson(tol=TOL, max_iter=12)
                )
                yield f"forward {name}", functools.partial(error, solve, truth), 10 * TOL
            if dtype.itemsize == 2:
                continue  # the backward computes in float32
            z = [t.to(device, dtype) for t in truth]
            exact = adjoint(reference.BACKEND, given.exact(), truth, tight)
            option = Implicit("bicgstab" if cut else "gmres", tol=TOL, max_iter=20)
            solve = functools.partial(adjoint, LIBRARY if cut else cuda.BACKEND, given, z, option)
            kind = "CUDA adjoint" if cut else "Triton VJPs"
            yield f"{kind} {name}", functools.partial(error, solve, exact), backward
            if not cut:
                exact = penalty(reference.BACKEND, given.exact(), truth)
                measure = functools.partial(penalty, cuda.BACKEND, given, z)
                yield f"penalty {name}", functools.partial(error, measure, exact), backward
                exact, measure = exact_units(given.exact()), functools.partial(units, given)
                yield f"unit size {name}", functools.partial(error, measure, exact), TOL


def main() -> int:
    """Command line entry point."""
    from deqfuse.triton_kernels.launch import counted

    device = "cuda" if torch.cuda.is_available() else "cpu"
    absent = cuda_native.device_error(0) if device == "cuda" else None
    if device == "cpu" and cpu_native.module is None:
        absent = "the compiled module, which has the host policy, is missing"
    wrong, ran = [absent] if absent else [], set()
    for precision in ("ieee", "tf32") if device == "cuda" else ("ieee",):
        torch.backends.cuda.matmul.fp32_precision = precision
        for name, run, limit in runs(device):
            if absent and name.startswith("CUDA"):
                continue
            with counted() as launched:
                off = run()
            ran |= set(launched)
            print(f"{name}, {precision}: relative error {off:.1e}", *sorted(set(launched)))
            if not off <= limit:
                wrong.append(f"{name}, {precision}: {off:.1e} is more than {limit:.0e}")
    if wrong:
        print("wrong:", *wrong, sep="\n  ")
        return 1
    print(f"every kernel ran: {', '.join(sorted(ran))} and the CUDA adjoint, {', '.join(CUTS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
