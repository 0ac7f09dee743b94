"""Which backend takes which problem, as a Markdown table: asked of the backends themselves.

    python -m tools.support_table

The table is that of the code, whatever the machine: a GPU need not be there, nor the C++ module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from deqfuse import Anderson, Broyden, Implicit, Neumann, NewtonKrylov, OneStep, Picard, Unrolled
from deqfuse.backends import cpu, cuda, reference
from deqfuse.backends.problem import Problem
from deqfuse.solvers.options import GradientOption, SolverOption

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SOLVERS: tuple[SolverOption, ...] = (
    Anderson(), Anderson(m=8), Anderson(m=9), Anderson(rescue=True), Anderson(trace=True), Picard(),
    Broyden(), NewtonKrylov(),
)  # fmt: skip
GRADIENTS: tuple[GradientOption, ...] = (
    Implicit(), Implicit(solver="anderson"), Implicit(solver="neumann"), Implicit(solver="gmres"),
    Implicit(solver="bicgstab"), Implicit(solver="dense"), OneStep(), Neumann(), Unrolled(),
)  # fmt: skip
# On the devices that it is for: what else it does not take.
BACKENDS: dict[str, tuple[str, Callable[[Problem], str | None]]] = {
    "cpu": ("cpu", cpu.refuses),
    "cuda": ("cuda", cuda.refuses_problem),
    "reference": ("cpu", reference.refuses),
}
DIM, GROUPS = 64, 4


def shown(option: SolverOption | GradientOption) -> str:
    """An option as one writes it: what is not the default."""
    plain = type(option)()
    named = [
        f"{name}={getattr(option, name)!r}"
        for name in option.__dataclass_fields__
        if getattr(option, name) != getattr(plain, name)
    ]
    return f"{type(option).__name__}({', '.join(named)})"


def problems() -> Iterator[tuple[str, Callable[[str], Problem]]]:
    """What varies, one thing at a time, and the problem on a device of the given kind."""
    for dtype in DTYPES:
        yield str(dtype), functools.partial(_problem, dtype=dtype)
    for solver in SOLVERS:
        yield f"`{shown(solver)}`", functools.partial(_problem, solver=solver)
    for adjoint in GRADIENTS:
        yield f"`{shown(adjoint)}`", functools.partial(_problem, adjoint=adjoint)


def _problem(
    device: str,
    dtype: torch.dtype = torch.float32,
    solver: SolverOption = SOLVERS[0],
    adjoint: GradientOption = GRADIENTS[0],
) -> Problem:
    return Problem(torch.device(device), dtype, DIM, GROUPS, solver, adjoint)


def table() -> str:
    """The table, and below it why a backend refuses."""
    lines = [f"| option | {' | '.join(BACKENDS)} |", f"|---|{'---|' * len(BACKENDS)}"]
    reasons: list[str] = []
    for name, problem in problems():
        cells = []
        for backend, (device, refuses) in BACKENDS.items():
            reason = refuses(problem(device))
            if reason is None:
                cells.append("yes")
                continue
            text = f"`{backend}`: {reason}."
            if text not in reasons:
                reasons.append(text)
            cells.append(f"no ({reasons.index(text) + 1})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = [f"{number}. {text}" for number, text in enumerate(reasons, start=1)]
    return "\n".join([*lines, "", *notes])


if __name__ == "__main__":
    print(table())
