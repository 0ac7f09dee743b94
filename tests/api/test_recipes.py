"""The recipes of docs/how-to/extend.md, followed by the letter: a new solver, a new backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from deq_cases import EXACT, TIGHT, B, Map, N, dense_gradients, randn
from torch import Tensor

from deqfuse import DEQ, BackendUnavailable, DEQFusion, scalars
from deqfuse.backends import BACKENDS, Backend, Problem, reference
from deqfuse.backends.backend import Launchers
from deqfuse.solvers.options import SolverOption, knob
from deqfuse.solvers.rows import Rows, Solution, select
from deqfuse.solvers.solve import SOLVERS
from deqfuse.testing import gradient_errors

# The equilibrium and u have relative errors of 1e-12 times |(I - J)^-1|, which is below 2 for this
# layer and at most 1 / (1 - 0.7) for this map; two digits are left for second derivatives.
LIMIT = 1e-9

# ---- add a solver: what its own file would hold --------------------------------------------------


@dataclass(frozen=True)
class Averaged(SolverOption):
    """``z <- (1 - weight) z + weight f(z)``, per row."""

    weight: float = knob(0.8, scalars.mixing)


def averaged(f: Callable[[Tensor], Tensor], z0: Tensor, option: Averaged) -> Solution:
    rows = Rows(z0, option.tol, option.max_iter, trace=option.trace)
    z = z0
    while rows.observe(z, fz := f(z)):
        z = select(rows.active, (1 - option.weight) * z + option.weight * fz, z)
    return rows.solution()


@pytest.fixture
def solver(monkeypatch: pytest.MonkeyPatch) -> Averaged:
    # The line in solvers/solve.py.
    monkeypatch.setitem(SOLVERS, Averaged, lambda f, z0, option, linearize: averaged(f, z0, option))
    return Averaged(tol=1e-12, max_iter=500)


def layer(**options: Any) -> DEQFusion:
    torch.manual_seed(0)
    return DEQFusion(8, 2, num_groups=2, adjoint=EXACT, **options).double()


def features(rows: int = 5) -> list[Tensor]:
    return [randn(rows, 8, seed=seed) for seed in (3, 4)]


def test_without_its_line_the_solver_is_refused() -> None:
    with pytest.raises(TypeError, match=r"solver: expected Anderson\(...\), .*, got Averaged"):
        layer(solver=Averaged())


def test_a_new_solver_solves_the_layer(solver: Averaged) -> None:
    z, info = layer(solver=solver)(features(), return_info=True)
    assert info.converged.all()
    assert info.backend == "reference"  # the only one that runs solvers which it does not know
    assert (info.nfe > 1).all()
    torch.testing.assert_close(z, layer()(features()), rtol=0, atol=1e-3)  # to Anderson's 1e-4


def test_the_layers_gradients_with_a_new_solver(solver: Averaged) -> None:
    errors = gradient_errors(layer(solver=solver), features())
    assert max(errors.values()) < LIMIT


def test_a_new_solver_solves_any_map(solver: Averaged) -> None:
    f, x, g = Map(), randn(B, N).requires_grad_(), randn(B, N, seed=5)
    z, info = DEQ(f, solver=solver, adjoint=EXACT)(torch.zeros_like(x), x)
    assert info.converged.all()
    torch.testing.assert_close(z, f(z, x), rtol=0, atol=1e-11)
    wanted = [x, f.weight, f.bias]
    expected = dense_gradients(lambda z: f(z, x), z.detach(), wanted, g)
    for given, exact in zip(torch.autograd.grad(z, wanted, g), expected, strict=True):
        torch.testing.assert_close(given, exact, rtol=LIMIT, atol=LIMIT)


def test_a_new_solver_traces_its_steps(solver: Averaged) -> None:
    option = Averaged(tol=1e-6, trace=True)
    _, info = layer(solver=option)(features(), return_info=True)
    assert info.fuse.trace is not None
    assert len(info.fuse.trace) == option.max_iter
    assert torch.equal((~info.fuse.trace.isnan()).sum(0), info.fuse.nfe)


def test_a_new_solver_is_one_operator_of_a_compiled_graph(solver: Averaged) -> None:
    torch._dynamo.reset()
    fusion, xs = layer(solver=solver), [x.requires_grad_() for x in features()]
    compiled = torch.compile(fusion, fullgraph=True, backend="aot_eager")
    leaves, g = [*xs, *fusion.parameters()], randn(5, 8, seed=6)
    expected = torch.autograd.grad(fusion(xs), leaves, g)
    given = torch.autograd.grad(compiled(xs), leaves, g)
    torch.testing.assert_close(given, expected, rtol=LIMIT, atol=LIMIT)
    torch._dynamo.reset()


# ---- add a backend: what its own module would hold -----------------------------------------------


class Toy:
    """A backend whose launchers are the reference's, counted."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.missing: tuple[str, str] | None = None
        self.backend = Backend(
            summary="The reference, counted.",
            unavailable=lambda: self.missing,
            refuses=self.refuses,
            cells=self.counted("cells", reference.BACKEND.cells),
            fuse=self.counted("fuse", reference.BACKEND.fuse),
            layer=self.counted("layer", reference.BACKEND.layer),
            penalty=reference.BACKEND.penalty,
            takes_rows=lambda z0, solver: False,
            anderson=reference.BACKEND.anderson,
        )

    def refuses(self, problem: Problem) -> str | None:
        return f"it takes 8 features, not {problem.dim}" if problem.dim != 8 else None

    def counted(self, block: str, launchers: Launchers) -> Launchers:
        def count(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
            def run(*operands: Any) -> Any:
                self.calls[name] += 1
                return launch(*operands)

            return run

        solve, adjoint = launchers
        return Launchers(count(f"solve_{block}", solve), count(f"adjoint_{block}", adjoint))


@pytest.fixture
def toy() -> Iterator[Toy]:
    """In front of all others, and "auto" asks it first."""
    before, made = dict(BACKENDS), Toy()
    BACKENDS.clear()
    BACKENDS.update({"toy": made.backend, **before})
    yield made
    BACKENDS.clear()
    BACKENDS.update(before)


@pytest.mark.parametrize("requested", ["toy", "auto"])
def test_a_new_backend_runs_a_layer_and_its_adjoint(toy: Toy, requested: str) -> None:
    fusion = layer(backend=requested)
    z, info = fusion(features(), return_info=True)
    assert info.backend == "toy"
    z.backward(randn(5, 8, seed=6))
    assert toy.calls == {"solve_layer": 1, "adjoint_layer": 1}
    assert torch.equal(z, layer(backend="reference")(features()))


def test_a_new_backend_runs_single_blocks(toy: Toy) -> None:
    xs = [x.requires_grad_() for x in features()]
    layer(backend="toy", gate=False)(xs).backward(randn(5, 8, seed=6))  # cells, then in closed form
    layer(backend="toy", cell="identity")(xs).backward(randn(5, 8, seed=6))
    assert toy.calls == {
        "solve_cells": 1, "adjoint_cells": 1, "solve_fuse": 1, "adjoint_fuse": 1,
    }  # fmt: skip


def test_its_gradients_are_exact(toy: Toy) -> None:
    assert max(gradient_errors(layer(backend="toy"), features()).values()) < LIMIT
    assert toy.calls["adjoint_layer"] == 1


def test_auto_moves_on_where_it_refuses(toy: Toy) -> None:
    wide = DEQFusion(16, 2)
    xs = [randn(3, 16, seed=seed).float() for seed in (3, 4)]
    _, info = wide(xs, return_info=True)
    assert info.backend != "toy"
    assert not toy.calls
    wide.backend = "toy"
    with pytest.raises(
        BackendUnavailable,
        match="backend='toy' cannot take this call: it takes 8 features, not 16",
    ):
        wide(xs)


def test_auto_moves_on_where_it_is_unavailable(toy: Toy) -> None:
    toy.missing = ("its library is missing", "build it")
    _, info = layer()(features(), return_info=True)
    assert info.backend != "toy"
    assert not toy.calls
    with pytest.raises(BackendUnavailable, match=r"its library is missing\. Remedy: build it"):
        layer(backend="toy")(features())


def test_maps_of_ones_own_pass_it_by(toy: Toy) -> None:
    x = randn(B, N)
    _, info = DEQ(Map())(torch.zeros_like(x), x)
    assert info.backend != "toy"  # takes_rows says no


# ---- give the layer a cell of your own -----------------------------------------------------------


class GatedCell(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = torch.nn.GRUCell(8, 8)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.gru(x, z)


def test_a_cell_of_ones_own_is_an_argument() -> None:
    fusion = layer(solver=TIGHT, cells=[GatedCell(), None])
    _, info = fusion(features(), return_info=True)
    assert info.converged.all()
    assert max(gradient_errors(fusion, features()).values()) < LIMIT
