"""``DEQ(f)`` in torch's modes, copied, in threads, and differentiated twice."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from deq_cases import EXACT, TIGHT, B, Map, N, assert_gradients, dense_gradients, ids, randn
from torch import Tensor

from deqfuse import (
    DEQ,
    Anderson,
    Broyden,
    DoubleBackwardError,
    Implicit,
    Neumann,
    OneStep,
    Picard,
    Unrolled,
)
from deqfuse.solvers.options import GradientOption, SolverOption

# ---- modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Unrolled()], ids=ids)
def test_no_grad(adjoint: GradientOption) -> None:
    f, x = Map(), randn(B, N)
    deq = DEQ(f, adjoint=adjoint)
    with torch.no_grad():
        z, info = deq(torch.zeros_like(x), x)
    assert not z.requires_grad
    assert info.converged.all()
    with torch.inference_mode():
        again, _ = deq(torch.zeros_like(x), x)
    assert torch.equal(again, z)


@pytest.mark.parametrize("solver", [Anderson(), Picard(max_iter=3), Broyden()], ids=ids)
@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], ids=ids)
def test_grad_mode_does_not_change_the_answer(
    solver: SolverOption, adjoint: GradientOption
) -> None:
    """f(z) of the best iterate, whether or not somebody wants gradients of it."""
    x = randn(B, N)
    deq = DEQ(Map(), solver=solver, adjoint=adjoint, on_failure="ignore")
    with_graph, _ = deq(torch.zeros_like(x), x)
    with torch.no_grad():
        without, _ = deq(torch.zeros_like(x), x)
    assert with_graph.requires_grad
    assert torch.equal(with_graph, without)


def test_eval_mode_changes_nothing() -> None:
    x, g = randn(B, N).requires_grad_(), randn(B, N, seed=1)
    deq = DEQ(Map())
    results = []
    for mode in (True, False):
        z, _ = deq.train(mode)(torch.zeros_like(x), x)
        results.append((z.detach(), *torch.autograd.grad(z, [x, deq.f.weight], g)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_two_forwards_before_one_backward() -> None:
    f, x, y = Map(), randn(B, N).requires_grad_(), randn(B, N, seed=1).requires_grad_()
    deq = DEQ(f, solver=TIGHT, adjoint=EXACT)
    start, g = torch.zeros(B, N, dtype=torch.float64), randn(B, N, seed=2)
    first, _ = deq(start, x)
    second, _ = deq(start, y)
    found = torch.autograd.grad((first, second), [x, y, f.weight], (g, 2 * g))
    gx, gw = dense_gradients(lambda z: f(z, x), first.detach(), [x, f.weight], g)
    gy, hw = dense_gradients(lambda z: f(z, y), second.detach(), [y, f.weight], 2 * g)
    assert_gradients(list(found), [gx, gy, gw + hw])


def test_backward_twice_through_a_retained_graph() -> None:
    x, g = randn(B, N).requires_grad_(), randn(B, N, seed=1)
    z, _ = DEQ(Map())(torch.zeros(B, N, dtype=torch.float64), x)
    first = torch.autograd.grad(z, x, g, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(z, x, g)[0], first)


def test_equilibria_in_series() -> None:
    f, x = Map(), randn(B, N).requires_grad_()
    deq = DEQ(f, solver=TIGHT, adjoint=EXACT)
    start, g = torch.zeros(B, N, dtype=torch.float64), randn(B, N, seed=1)
    inner, _ = deq(start, x)
    outer, _ = deq(start, inner)
    (middle,) = dense_gradients(
        lambda z: f(z, inner_leaf),
        outer.detach(),
        [inner_leaf := inner.detach().requires_grad_()],
        g,
    )
    expected = dense_gradients(lambda z: f(z, x), inner.detach(), [x], middle)
    assert_gradients(list(torch.autograd.grad(outer, [x], g)), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_copies(clone: Callable[[DEQ], DEQ]) -> None:
    deq = DEQ(Map(), solver=TIGHT, adjoint=EXACT, on_failure="raise")
    x, g = randn(B, N).requires_grad_(), randn(B, N, seed=1)
    deq(torch.zeros_like(x), x)[0].backward(g)
    twin = clone(deq)
    assert (twin.solver, twin.adjoint, twin.on_failure) == (TIGHT, EXACT, "raise")
    twin.zero_grad()
    twin(torch.zeros_like(x), x)[0].backward(g)
    assert twin.f.weight is not deq.f.weight
    assert torch.equal(twin.f.weight.grad, deq.f.weight.grad)


def test_parallel_threads_do_not_share_state() -> None:
    from concurrent.futures import ThreadPoolExecutor

    deq, xs = DEQ(Map()), [randn(B, N, seed=s) for s in range(8)]
    start = torch.zeros(B, N, dtype=torch.float64)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: deq(start, x)[0].detach(), xs))
    for x, z in zip(xs, together, strict=True):
        assert torch.equal(z, deq(start, x)[0].detach())


@pytest.mark.parametrize(
    "adjoint", [Implicit(), Implicit(solver="dense"), OneStep(), Neumann(), Unrolled()], ids=ids
)
@pytest.mark.parametrize("solver", [Anderson(), Picard(), Broyden()], ids=ids)
def test_empty_batch(solver: SolverOption, adjoint: GradientOption) -> None:
    f, x = Map(), torch.zeros(0, N, dtype=torch.float64, requires_grad=True)
    z, info = DEQ(f, solver=solver, adjoint=adjoint)(x, x)
    assert z.shape == (0, N)
    assert info.converged.shape == (0,)
    z.sum().backward()
    assert x.grad is None or x.grad.shape == (0, N)
    assert f.weight.grad is None or torch.equal(f.weight.grad, torch.zeros_like(f.weight))


# ---- second derivatives -------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Neumann()], ids=ids)
@pytest.mark.parametrize(
    "loss", [lambda z: z.sum(), lambda z: z.square().sum()], ids=["sum", "square"]
)
@pytest.mark.parametrize("of", ["argument", "parameter"])
def test_second_derivatives_are_refused(
    adjoint: GradientOption, loss: Callable[[Tensor], Tensor], of: str
) -> None:
    f, x = Map(), randn(B, N).requires_grad_()
    z, _ = DEQ(f, adjoint=adjoint)(torch.zeros_like(x), x)
    target = x if of == "argument" else f.weight
    (grad,) = torch.autograd.grad(loss(z), target, create_graph=True)
    with pytest.raises(DoubleBackwardError, match=r"adjoint=Unrolled\(\)"):
        torch.autograd.grad(grad.square().sum(), target)


def test_create_graph_alone_is_allowed_and_right() -> None:
    x, g = randn(B, N).requires_grad_(), randn(B, N, seed=1)
    z, _ = DEQ(Map())(torch.zeros_like(x), x)
    plain = torch.autograd.grad(z, x, g, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(z, x, g, create_graph=True)[0].detach(), plain)


@pytest.mark.parametrize(
    "solver", [Picard(tol=1e-13, max_iter=120), Anderson(m=2, tol=1e-13), Broyden(tol=1e-13)],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_unrolled_gives_first_and_second_derivatives(solver: SolverOption) -> None:
    """``z = a z + x`` has ``dz/da = x / (1 - a)^2`` and ``d2z/da2 = 2 x / (1 - a)^3``."""
    a, x = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), randn(1, 1)
    z, _ = DEQ(lambda z, a: a * z + x, solver=solver, adjoint=Unrolled())(torch.zeros_like(x), a)
    (first,) = torch.autograd.grad(z.sum(), a, create_graph=True)
    torch.testing.assert_close(first, (x / (1 - a) ** 2).sum(), rtol=1e-8, atol=0)
    if isinstance(solver, Picard):  # the others end on this problem in two exact steps
        (second,) = torch.autograd.grad(first, a)
        torch.testing.assert_close(second, (2 * x / (1 - a.detach()) ** 3).sum(), rtol=1e-8, atol=0)


def test_unrolled_agrees_with_implicit() -> None:
    f, x, g = Map(), randn(B, N).requires_grad_(), randn(B, N, seed=1)
    start, grads = torch.zeros(B, N, dtype=torch.float64), []
    for adjoint in (EXACT, Unrolled()):
        z, _ = DEQ(f, solver=Picard(tol=1e-13, max_iter=300), adjoint=adjoint)(start, x)
        grads.append(list(torch.autograd.grad(z, [x, f.weight, f.bias], g)))
    assert_gradients(*grads, tol=1e-9)


def test_gradcheck() -> None:
    weight = (0.1 * randn(3, 3)).requires_grad_()
    f = lambda z, x, w: torch.tanh(z @ w + x)  # noqa: E731
    deq = DEQ(f, solver=TIGHT, adjoint=EXACT)
    start, x = torch.zeros(2, 3, dtype=torch.float64), randn(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: deq(start, x, w)[0], (x, weight))


def test_gradgradcheck_of_unrolled() -> None:
    deq = DEQ(lambda z, x: torch.tanh(0.3 * z + x), solver=Picard(tol=1e-13), adjoint=Unrolled())
    start, x = torch.zeros(2, 2, dtype=torch.float64), randn(2, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: deq(start, x)[0], (x,))
