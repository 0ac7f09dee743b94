"""The three kinds of block that are solved, each as one record: its operators and its operands.

``CELLS`` are the N residual cells, ``FUSE`` the purify-then-combine step for given cells, ``LAYER``
both at once. Every kind has two operators: the solve and its adjoint, which turns cotangents of the
equilibrium into gradients. Options travel as text (``Option.code``), so one schema serves every
solver and every backend, and ``torch.compile`` sees constants.

The operands of a solve come in this order::

    rows      features; one row per sample in front of the last dimension, differentiated
    params    parameters, shared by all rows, differentiated
    others    what is not differentiated: masks, starts, what is present, sizes
    options   num_groups, variant, solver, adjoint, backend, on_failure

and those of an adjoint in this one: the cotangents, the equilibrium, rows, params, the others that
``masks`` and ``sizes`` name, then num_groups, variant, adjoint, backend, want_params. It returns
the gradients of the rows, those of the parameters, and three statistics per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqfuse import reporting
from deqfuse.backends import presence
from deqfuse.backends.backend import Backend, Launchers

_SOLVE = "int num_groups, str variant, str solver, str adjoint, str backend, str on_failure"
_ADJOINT = "int num_groups, str variant, str adjoint, str backend, bool want_params"
_SOLVED = "Tensor, Tensor, Tensor, Tensor, Tensor"  # z, residual, nfe, outcome, trace
_STATISTICS = "Tensor, Tensor, Tensor"  # residual, nfe, outcome


def _define(name: str, schema: str) -> None:
    """The operator, and its twin for what no CUDA graph can hold: see ``captures.py``."""
    torch.library.define(f"deqfuse::{name}", schema)
    tags = (torch.Tag.cudagraph_unsafe,)
    torch.library.define(f"deqfuse::{name}_uncaptured", schema, tags=tags)


_define(
    "solve_cells",
    f"(Tensor x, Tensor[] params, Tensor? z0, Tensor? present, {_SOLVE}) -> ({_SOLVED})",
)
_define(
    "adjoint_cells",
    f"(Tensor grad_z, Tensor z, Tensor x, Tensor[] params, Tensor? present, {_ADJOINT}) "
    f"-> (Tensor, Tensor[], {_STATISTICS})",
)
_define(
    "solve_fuse",
    "(Tensor x_fuse, Tensor cell_sum, Tensor[] params, Tensor? mask, Tensor? z0, Tensor? counts, "
    f"int num_modalities, {_SOLVE}) -> ({_SOLVED})",
)
_define(
    "adjoint_fuse",
    "(Tensor grad_z, Tensor z, Tensor x_fuse, Tensor cell_sum, Tensor[] params, Tensor? mask, "
    f"Tensor? counts, int num_modalities, {_ADJOINT}) -> (Tensor, Tensor, Tensor[], {_STATISTICS})",
)
_define(
    "solve_layer",
    "(Tensor[] x, Tensor[] params, Tensor? mask, Tensor? z0_fuse, Tensor? z0_cells, "
    f"Tensor? present, {_SOLVE}) -> (Tensor, {_SOLVED})",  # the fused z, then all equilibria
)
_define(
    "adjoint_layer",
    "(Tensor grad_z, Tensor? grad_cells, Tensor states, Tensor[] x, Tensor[] params, Tensor? mask, "
    f"Tensor? present, {_ADJOINT}) -> (Tensor[], Tensor[], {_STATISTICS})",
)


class Operators(NamedTuple):
    """One and the same computation as two operators of ``torch.ops``.

    Attributes:
        captured: for what a CUDA graph can hold.
        uncaptured: for the rest; tagged, so that Inductor leaves it out of its graphs.
    """

    captured: Any
    uncaptured: Any

    @classmethod
    def named(cls, name: str) -> Operators:
        """The operator of this name, and its twin.

        Args:
            name: without the namespace.

        Returns:
            Both.
        """
        ops = torch.ops.deqfuse
        return cls(getattr(ops, name).default, getattr(ops, f"{name}_uncaptured").default)


@dataclass(frozen=True, eq=False)
class Block:
    """A kind of block: what its operators take and give. The module's text names the operands.

    Args:
        name: of the kind, as in the operators' names.
        solve: the operator of the solve, as ``torch.ops`` has it, and its twin that no CUDA graph
            holds.
        adjoint: those of the adjoint.
        launchers: (backend) -> the two functions of that backend which the operators run.
        num_rows: how many rows operands there are; None where they are one list of them.
        num_others: how many operands have no gradient: masks, starts, sizes.
        masks: positions, among the others, of those that the adjoint takes, too: tensors whose
            rows lie in front of the last dimension, or None.
        sizes: positions, among the others, of numbers that the adjoint takes behind the masks.
        num_equilibria: how many leading results of the solve are equilibria; the adjoint is given
            the last of them.
        cotangents: (cotangents of the equilibria) -> those that the adjoint takes.
        parts: what a report calls the block's parts, in the order in which they are solved.
    """

    name: str
    solve: Operators
    adjoint: Operators
    launchers: Callable[[Backend], Launchers]
    num_rows: int | None
    num_others: int
    masks: tuple[int, ...]
    sizes: tuple[int, ...]
    num_equilibria: int
    cotangents: Callable[..., tuple[Any, ...]]
    parts: reporting.Parts

    @property
    def num_results(self) -> int:
        """How many tensors the solve returns: equilibria, residual, nfe, outcome, trace."""
        return self.num_equilibria + 4

    def join(
        self, rows: Sequence[Tensor], params: Sequence[Tensor], others: Sequence[Any]
    ) -> tuple[Any, ...]:
        """The operands of an operator, or of a launcher, from their kinds.

        Args:
            rows: (..., d) each, features.
            params: (...) each, parameters.
            others: masks, starts and sizes.

        Returns:
            The operands in the operator's order, without the options.
        """
        if self.num_rows is None:
            return (list(rows), list(params), *others)
        return (*rows, list(params), *others)

    def split(
        self, inputs: Sequence[Any]
    ) -> tuple[list[Tensor], list[Tensor], tuple[Any, ...], tuple[Any, ...]]:
        """Rows, params, others and options of a call of the solve; the inverse of :meth:`join`.

        Args:
            inputs: all operands of the solve, the options among them.

        Returns:
            Rows (..., d), params (...), others, options.
        """
        at = 1 if self.num_rows is None else self.num_rows
        rows = list(inputs[0]) if self.num_rows is None else list(inputs[:at])
        end = at + 1 + self.num_others
        return rows, list(inputs[at]), tuple(inputs[at + 1 : end]), tuple(inputs[end:])

    def split_gradients(self, results: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Gradients of the rows, of the params, and the statistics, from an adjoint's results.

        Args:
            results: what the operator or the launcher of the adjoint returned.

        Returns:
            Gradients of the rows, gradients of the params, statistics.
        """
        at = 1 if self.num_rows is None else self.num_rows
        rows = list(results[0]) if self.num_rows is None else list(results[:at])
        return rows, list(results[at]), list(results[at + 1 :])


CELLS = Block(
    name="cells",
    solve=Operators.named("solve_cells"),
    adjoint=Operators.named("adjoint_cells"),
    launchers=presence.cells,
    num_rows=1,  # x
    num_others=2,  # z0, present
    masks=(1,),
    sizes=(),
    num_equilibria=1,  # z
    cotangents=lambda grad_z: (grad_z,),
    parts=reporting.CELLS,
)
FUSE = Block(
    name="fuse",
    solve=Operators.named("solve_fuse"),
    adjoint=Operators.named("adjoint_fuse"),
    launchers=presence.fuse,
    num_rows=2,  # x_fuse, cell_sum
    num_others=4,  # mask, z0, counts, num_modalities
    masks=(0, 2),
    sizes=(3,),
    num_equilibria=1,  # z
    cotangents=lambda grad_z: (grad_z,),
    parts=reporting.FUSE,
)
LAYER = Block(
    name="layer",
    solve=Operators.named("solve_layer"),
    adjoint=Operators.named("adjoint_layer"),
    launchers=presence.whole,
    num_rows=None,  # x
    num_others=4,  # mask, z0_fuse, z0_cells, present
    masks=(0, 3),
    sizes=(),
    # The fused z, for callers to write into, and all equilibria, in memory of the operator's own.
    num_equilibria=2,
    # Callers get the cells of the second only, so the cotangent of its fused row is zero.
    cotangents=lambda grad_z, grad_states: (
        grad_z,
        None if grad_states is None else grad_states[:-1],
    ),
    parts=reporting.LAYER,
)
BLOCKS = (CELLS, FUSE, LAYER)
