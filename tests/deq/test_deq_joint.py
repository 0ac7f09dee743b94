"""``DEQ(f)`` whose rows see each other: exact as one problem, never silently wrong as many."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from deq_cases import EXACT, TIGHT, assert_gradients, ids, randn
from torch import Tensor, nn

import deqfuse
from deqfuse import (
    DEQ,
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    Implicit,
    NewtonKrylov,
    OneStep,
    Outcome,
    Picard,
)
from deqfuse.solvers.options import LINEAR_SOLVERS, SolverOption

B, N = 6, 4
START = torch.zeros(B, N, dtype=torch.float64)
SOLVERS = [
    TIGHT,
    Anderson(tol=1e-12, max_iter=200, rescue=True),
    Picard(tol=1e-12, max_iter=2000),
    Broyden(tol=1e-12, max_iter=200, m=40),
    NewtonKrylov(tol=1e-12, max_iter=2000),
]


def graph(gain: float = 0.9) -> Callable[[Tensor, Tensor], Tensor]:
    """A product over the batch with a matrix whose rows sum to ``gain``."""
    weights = randn(B, B, seed=1).abs()
    weights = gain * weights / weights.sum(1, keepdim=True)
    return lambda z, x: weights @ z + x


def attention(gain: float = 0.9) -> Callable[[Tensor, Tensor], Tensor]:
    """The batch as one sequence: what ``(B, d)`` means to ``nn.MultiheadAttention``."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(N, 2).double()
    return lambda z, x: gain * torch.tanh(3 * layer(z, z, z, need_weights=False)[0] + x)


def normed(gain: float = 0.5) -> Callable[[Tensor, Tensor], Tensor]:
    """Statistics over the batch, by hand: no module tells of them."""

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(gain * nn.functional.batch_norm(z, None, None, training=True) + x)

    return f


COUPLED = {"graph": graph, "attention": attention, "batch statistics": normed}
coupled = pytest.mark.parametrize("name", COUPLED)


def dense(f: Callable[[Tensor, Tensor], Tensor], z: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """The gradient with respect to x from the whole Jacobian of the state, (B n, B n)."""
    shape, x = z.shape, x.detach().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(
        lambda v: f(v.view(shape), x).flatten(), z.detach().flatten()
    )
    eye = torch.eye(len(jacobian), dtype=z.dtype)
    u = torch.linalg.solve((eye - jacobian).mT, g.flatten()).view(shape)
    return torch.autograd.grad(f(z.detach(), x), x, u)[0]


# ---- joint ---------------------------------------------------------------------------------------


@coupled
@pytest.mark.parametrize("linear", LINEAR_SOLVERS)
def test_joint_gradients_are_those_of_the_whole_state(name: str, linear: str) -> None:
    f, x, g = COUPLED[name](), randn(B, N, seed=2).requires_grad_(), randn(B, N, seed=3)
    adjoint = Implicit(solver=linear, tol=1e-12, max_iter=2000)
    z, info = DEQ(f, rows="joint", solver=TIGHT, adjoint=adjoint)(START, x)
    assert info.converged.tolist() == [True]
    torch.testing.assert_close(z, f(z, x), rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(z, x, g)
    assert_gradients(list(found), [dense(f, z, x, g)])


@coupled
@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_joint_solves_by_every_solver(name: str, solver: SolverOption) -> None:
    f, x = COUPLED[name](0.4), randn(B, N, seed=2)
    z, info = DEQ(f, rows="joint", solver=solver)(START, x)
    assert info.converged.all()
    torch.testing.assert_close(z, f(z, x), rtol=1e-10, atol=1e-10)


def test_joint_takes_batch_norm_in_training_mode() -> None:
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(N, N), nn.BatchNorm1d(N), nn.Tanh()).double()
    f[0].weight.data *= 0.5
    step = lambda z, x: 0.5 * f(z) + x  # noqa: E731
    x, g = randn(B, N, seed=2).requires_grad_(), randn(B, N, seed=3)
    for solver in (TIGHT, NewtonKrylov(tol=1e-12, max_iter=2000)):
        z, info = DEQ(step, rows="joint", solver=solver, adjoint=EXACT)(START, x)
        assert info.converged.all()
        assert_gradients(list(torch.autograd.grad(z, x, g)), [dense(step, z, x, g)])


def test_joint_info_is_that_of_one_problem() -> None:
    solver = Anderson(tol=1e-12, max_iter=200, trace=True)
    z, info = DEQ(graph(), rows="joint", solver=solver)(START, randn(B, N))
    assert z.shape == (B, N)
    assert info.fuse.residual.shape == info.nfe.shape == info.converged.shape == (1,)
    assert info.fuse.trace is not None
    assert info.fuse.trace.shape[1:] == (1,)
    # The radius of the graph's matrix, whose rows sum to 0.9, for every column alike.
    torch.testing.assert_close(info.spectral_radius().item(), 0.9, rtol=1e-3, atol=0)
    assert info.jacobian_penalty() > 0


def test_joint_states_may_have_any_shapes() -> None:
    """Nodes and edges of a graph have no dimension in common; a scalar is a state, too."""

    def f(z: tuple[Tensor, Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nodes, edges, total = z
        return 0.2 * edges.sum(0) + x, 0.1 * nodes.mean() + 0.3 * edges, 0.5 * total + nodes.sum()

    x = randn(3, seed=1).requires_grad_()
    start = (torch.zeros_like(x), torch.zeros(5, 3, dtype=x.dtype), torch.zeros((), dtype=x.dtype))
    z, info = DEQ(f, rows="joint", solver=TIGHT)(start, x)
    assert [part.shape for part in z] == [(3,), (5, 3), ()]
    assert info.converged.all()
    for found, again in zip(z, f(z, x), strict=True):
        torch.testing.assert_close(found, again, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"z0\[1\].*Remedy: rows='joint'"):
        DEQ(f)(start, x)


def test_separate_rows_may_be_solved_as_one_problem() -> None:
    x, g = randn(B, N, seed=2).requires_grad_(), randn(B, N, seed=3)
    f = lambda z, x: torch.tanh(0.5 * z + x)  # noqa: E731
    one, many = (DEQ(f, rows=rows, solver=TIGHT, adjoint=EXACT) for rows in ("joint", "separate"))
    (a, _), (b, _) = one(START, x), many(START, x)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert_gradients(list(torch.autograd.grad(a, x, g)), list(torch.autograd.grad(b, x, g)))


def test_an_empty_state_is_solved() -> None:
    z, info = DEQ(lambda z: z, rows="joint")(torch.zeros(0, 3))
    assert z.shape == (0, 3)
    assert info.converged.all()


def test_rows_is_checked() -> None:
    with pytest.raises(ValueError, match="rows: expected one of 'separate', 'joint', got 'both'"):
        DEQ(graph(), rows="both")  # type: ignore[arg-type]


# ---- separate: never silently wrong --------------------------------------------------------------


def solve_separate(
    f: Callable[[Tensor, Tensor], Tensor], x: Tensor, g: Tensor, **options: Any
) -> tuple[list[str], float, float]:
    """Warnings of a forward and a backward; residual of z as a whole; error of the gradient."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        z, _ = DEQ(f, **options)(START, x)
        (found,) = torch.autograd.grad(z, x, g)
    z, exact = z.detach(), dense(f, z, x, g)
    image = f(z, x).detach()
    residual = float(((image - z).norm(dim=1) / (image.norm(dim=1) + 1e-5)).max())
    said = [str(w.message) for w in caught if issubclass(w.category, ConvergenceWarning)]
    return said, residual, float((found - exact).norm() / exact.norm())


@coupled
@pytest.mark.parametrize("gain", [0.6, 1.2])
@pytest.mark.parametrize(("solver", "linear"), [
    *((Anderson(tol=1e-6, max_iter=60), linear) for linear in LINEAR_SOLVERS),
    (Picard(tol=1e-6, max_iter=100), "auto"), (Broyden(tol=1e-6, max_iter=60), "auto"),
    (NewtonKrylov(tol=1e-6), "auto"),
    (Anderson(tol=1e-6, max_iter=12, rescue=True, max_jacobians=500), "auto"),
], ids=ids)  # fmt: skip
def test_a_coupled_answer_is_right_or_warned_of(
    name: str, gain: float, solver: SolverOption, linear: str
) -> None:
    """Rows of very different cotangents, as in a mean over few of them.

    Without a warning every row's residual is at most twice the tolerance with all rows in place,
    of the state and of the adjoint; f(z), which is returned, has a residual up to |J| times that.
    The factor 50 stands for |J| and for the condition of I - J of these maps.
    """
    f, x = COUPLED[name](gain), randn(B, N, seed=2).requires_grad_()
    g = randn(B, N, seed=3) * torch.logspace(0, -3, B, dtype=torch.float64)[:, None]
    adjoint = Implicit(solver=linear, tol=1e-6)
    said, residual, error = solve_separate(f, x, g, solver=solver, adjoint=adjoint)
    if not said:
        assert max(residual, error) <= 50 * 2e-6


@pytest.mark.parametrize(("name", "gain"), [("graph", 0.9), ("attention", 1.2),
                                            ("batch statistics", 1.2)])  # fmt: skip
def test_coupled_rows_are_said_with_the_remedy(name: str, gain: float) -> None:
    f, x, g = COUPLED[name](gain), randn(B, N, seed=2).requires_grad_(), randn(B, N, seed=3)
    said, _, _ = solve_separate(f, x, g, solver=Anderson(tol=1e-8, max_iter=100))
    assert said
    assert all("DEQ(f, rows='joint')" in message for message in said)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_info_does_not_claim_convergence(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEQFUSE_BACKEND", backend)
    deq = DEQ(lambda z, x: 0.5 * z.mean(0, keepdim=True) + x, on_failure="ignore")
    _, info = deq(START, randn(B, N, seed=2))
    moved = info.outcome == Outcome.COUPLED
    assert moved.any()
    assert not info.converged[moved].any()
    assert (info.residual[moved] > 2e-4).all()
    assert (info.residual[info.converged] <= 1e-4).all()


def test_on_failure_raise_holds_for_coupled_rows() -> None:
    mean = lambda z, x: 0.5 * z.mean(0, keepdim=True) + x  # noqa: E731
    with pytest.raises(ConvergenceError, match="had converged and changed with later steps"):
        DEQ(mean, on_failure="raise")(START, randn(B, N, seed=2))


def test_a_failed_coupled_backward_names_the_remedy() -> None:
    """Only the adjoint's rows stop at different steps: the forward is exact at once."""
    weights = randn(B, B, seed=1) / B
    f = lambda z, x: weights @ x + 0 * z + (weights.mT @ (z - weights @ x))  # noqa: E731
    x, g = randn(B, N, seed=2).requires_grad_(), randn(B, N, seed=3)
    deq = DEQ(f, adjoint=Implicit(solver="dense"))
    z, info = deq((weights @ x).detach(), x)
    assert info.converged.all()
    with pytest.warns(ConvergenceWarning, match="backward solve.*rows='joint'"):
        torch.autograd.grad(z, x, g)


@pytest.mark.parametrize("linear", LINEAR_SOLVERS)
@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_separate_rows_are_never_called_coupled(solver: SolverOption, linear: str) -> None:
    """Rows that stop at very different steps, some expansive along the way, some that fail."""
    slopes = torch.tensor([0.0, 0.1, 0.5, 0.9, -3.0, 1.1], dtype=torch.float64)[:, None]
    f = lambda z, x: slopes * torch.sin(z) + x  # noqa: E731
    x = randn(B, N, seed=2).requires_grad_()
    deq = DEQ(f, solver=solver, adjoint=Implicit(solver=linear, tol=1e-10), on_failure="ignore")
    z, info = deq(START, x)
    assert info.nfe.min() < info.nfe.max()
    assert not (info.outcome == Outcome.COUPLED).any()
    adjoint = deqfuse.solvers.adjoint.solve_adjoint(
        lambda u: slopes * z.detach().cos() * u, randn(B, N, seed=3), deq.adjoint
    )
    assert not (adjoint.outcome == Outcome.COUPLED).any()


# ---- batch statistics ----------------------------------------------------------------------------


class Block(nn.Module):
    """A model whose step may or may not call its batch norm."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.calls = nn.Linear(N, N), nn.BatchNorm1d(N), calls
        self.linear.weight.data *= 0.3

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        h = self.linear(z)
        return torch.tanh(self.norm(h) if self.calls else h) + x

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return self(z, x)


BLOCK = Block(True)


def through_a_global(z: Tensor, x: Tensor) -> Tensor:
    return BLOCK(z, x)


class Held:
    """A callable that is no module."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        return self.block(z, x)


WAYS: dict[str, Callable[[Block], Any]] = {
    "module": lambda block: block,
    "closure": lambda block: lambda z, x: block(z, x),
    "function within a function": lambda block: lambda z, x: (lambda: block(z, x))(),
    "bound method": lambda block: block.step,
    "partial": lambda block: functools.partial(block.step),
    "callable object": lambda block: Held(block),
    "global": lambda block: through_a_global,
}


@pytest.mark.parametrize("way", WAYS)
def test_batch_statistics_over_separate_rows_are_refused(way: str) -> None:
    f, x = WAYS[way](Block(True)), torch.randn(B, N)
    with pytest.raises(ValueError, match=r"BatchNorm1d \(norm\).*Remedy: rows='joint', eval"):
        DEQ(f)(torch.zeros(B, N), x)
    assert not BLOCK.norm._forward_pre_hooks


def test_batch_statistics_that_f_does_not_take_are_none_of_its_business() -> None:
    block, x = Block(False), torch.randn(B, N)
    for f in (block, block.step):
        assert DEQ(f)(torch.zeros(B, N), x)[1].converged.all()
    used = Block(True)
    assert DEQ(used.eval())(torch.zeros(B, N), x)[1].converged.all()
    assert DEQ(used.train(), rows="joint")(torch.zeros(B, N), x)[1].converged.all()


# ---- named tuples --------------------------------------------------------------------------------


class Cell(NamedTuple):
    h: Tensor
    c: Tensor


@pytest.mark.parametrize("rows", ["separate", "joint"])
def test_a_named_tuple_stays_one(rows: Any) -> None:
    def f(z: Cell, x: Tensor) -> Cell:
        return Cell(h=0.5 * torch.tanh(z.c) + x, c=0.3 * z.h)

    x = randn(B, N, seed=2).requires_grad_()
    z, info = DEQ(f, rows=rows, solver=TIGHT, adjoint=OneStep())(Cell(START, START), x)
    assert isinstance(z, Cell)
    assert info.converged.all()
    torch.testing.assert_close(z.c, 0.3 * z.h)
    assert info.jacobian_penalty() > 0  # calls f once more
    assert isinstance(DEQ(f, rows=rows)(z, x)[0], Cell)
