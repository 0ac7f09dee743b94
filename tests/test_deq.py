"""``DEQ(f)``: any callable, any state, gradients to everything that f touches."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from deqfuse import (
    DEQ,
    Anderson,
    Broyden,
    DoubleBackwardError,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Outcome,
    Picard,
    Unrolled,
)
from deqfuse.solvers.options import LINEAR_SOLVERS, GradientOption, SolverOption

TIGHT = Anderson(tol=1e-12, max_iter=200)
EXACT = Implicit(tol=1e-12, max_iter=200)
B, N = 4, 5
ids = repr


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Map(nn.Module):
    """``tanh(W z + scale * x + b)`` with |W| = gain; a contraction for gain < 1."""

    def __init__(self, gain: float = 0.7) -> None:
        super().__init__()
        weight = randn(N, N, seed=1)
        self.weight = nn.Parameter(gain * weight / torch.linalg.matrix_norm(weight, 2))
        self.bias = nn.Parameter(randn(N, seed=2))

    def forward(self, z: Tensor, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return torch.tanh(z @ self.weight.mT + scale * x + self.bias)


def dense_gradients(
    f: Callable[[Tensor], Tensor],
    z_star: Tensor,  # (B, n)
    wanted: list[Tensor],
    g: Tensor,  # (B, n)
) -> list[Tensor]:
    """Implicit gradients by factorising ``I - J`` of every row."""
    jacobian = torch.func.jacrev(lambda z: f(z).sum(0))(z_star).movedim(0, 1).detach()
    eye = torch.eye(z_star.shape[1], dtype=z_star.dtype)
    u = torch.stack(
        [torch.linalg.solve((eye - j).mT, row) for j, row in zip(jacobian, g, strict=True)]
    )
    with torch.enable_grad():
        return list(torch.autograd.grad(f(z_star.detach()), wanted, u, materialize_grads=True))


def assert_gradients(found: list[Tensor], expected: list[Tensor], tol: float = 1e-8) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tol * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("linear", LINEAR_SOLVERS)
@pytest.mark.parametrize(
    "solver", [TIGHT, Picard(tol=1e-12, max_iter=400), Broyden(tol=1e-12, max_iter=200),
               NewtonKrylov(tol=1e-12)], ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_gradients_reach_arguments_and_parameters(solver: SolverOption, linear: str) -> None:
    f, x, scale = Map(), randn(B, N).requires_grad_(), torch.tensor(1.3, dtype=torch.float64)
    scale.requires_grad_()
    deq = DEQ(f, solver=solver, adjoint=Implicit(solver=linear, tol=1e-12, max_iter=300))
    z, info = deq(torch.zeros(B, N, dtype=torch.float64), x, scale)
    assert info.converged.all()
    torch.testing.assert_close(z, f(z, x, scale), rtol=1e-10, atol=1e-10)
    wanted, g = [x, scale, f.weight, f.bias], randn(B, N, seed=7)
    expected = dense_gradients(lambda z: f(z, x, scale), z.detach(), wanted, g)
    assert_gradients(list(torch.autograd.grad(z, wanted, g)), expected)


def test_closed_over_parameters_of_a_plain_function() -> None:
    weight = (0.1 * randn(N, N)).requires_grad_()
    inner = nn.Linear(N, N).double()
    f = lambda z: torch.tanh(z @ weight) + 0.1 * inner(z.cos())  # noqa: E731
    deq = DEQ(f, solver=TIGHT, adjoint=EXACT)
    z, _ = deq(randn(B, N))
    wanted, g = [weight, inner.weight, inner.bias], randn(B, N, seed=3)
    assert_gradients(
        list(torch.autograd.grad(z, wanted, g)), dense_gradients(f, z.detach(), wanted, g)
    )


def test_a_module_f_is_registered() -> None:
    deq = DEQ(Map())
    assert {name for name, _ in deq.named_parameters()} == {"f.weight", "f.bias"}


@pytest.mark.parametrize("shape", [(2, 3), (1,), (), (2, 1, 2)], ids=str)
def test_tensor_states_of_any_shape(shape: tuple[int, ...]) -> None:
    x = randn(B, *shape).requires_grad_()
    deq = DEQ(lambda z, x: 0.5 * torch.sin(z) + x, solver=TIGHT, adjoint=EXACT)
    z, info = deq(torch.zeros(B, *shape, dtype=torch.float64), x)
    assert z.shape == (B, *shape)
    assert info.fuse.residual.shape == info.converged.shape == info.nfe.shape == (B,)
    assert info.cells is None
    g = randn(B, *shape, seed=4)
    (found,) = torch.autograd.grad(z, x, g)
    torch.testing.assert_close(found, g / (1 - 0.5 * z.detach().cos()), rtol=1e-9, atol=1e-9)


def test_tuple_state() -> None:
    """Coupled parts of different shapes are one row: the joint Jacobian counts."""
    x, y = randn(B, 3).requires_grad_(), randn(B, 2, 2, seed=1).requires_grad_()

    def f(z: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = z
        return 0.3 * torch.tanh(a + b.sum((1, 2))[:, None]) + x, 0.3 * torch.sin(
            b * a[:, :1, None]
        ) + y

    deq = DEQ(f, solver=TIGHT, adjoint=EXACT)
    (a, b), info = deq((torch.zeros_like(x), torch.zeros_like(y)), x, y)
    assert isinstance(deq((x, y), x, y)[0], tuple)
    assert info.fuse.residual.shape == (B,)
    for found, again in zip((a, b), f((a, b), x, y), strict=True):
        torch.testing.assert_close(found, again, rtol=1e-10, atol=1e-10)

    def flat(z: Tensor) -> Tensor:
        parts = f((z[:, :3], z[:, 3:].view(-1, 2, 2)), x, y)
        return torch.cat([part.flatten(1) for part in parts], 1)

    ga, gb = randn(B, 3, seed=5), randn(B, 2, 2, seed=6)
    star = torch.cat([a.detach(), b.detach().flatten(1)], 1)
    expected = dense_gradients(flat, star, [x, y], torch.cat([ga, gb.flatten(1)], 1))
    assert_gradients(list(torch.autograd.grad((a, b), [x, y], (ga, gb))), expected)


def test_a_tuple_of_one_stays_a_tuple() -> None:
    z, _ = DEQ(lambda z: (0.5 * z[0],))((randn(B, 2),))
    assert isinstance(z, tuple)
    assert len(z) == 1


def test_unused_part_of_the_output() -> None:
    x = randn(B, 3).requires_grad_()
    f = lambda z, x: (0.5 * z[0] + x, 0.5 * z[1] + 2 * x)  # noqa: E731
    (a, _), _ = DEQ(f, solver=TIGHT, adjoint=EXACT)((torch.zeros_like(x), torch.zeros_like(x)), x)
    g = randn(B, 3, seed=1)
    torch.testing.assert_close(torch.autograd.grad(a, x, g)[0], 2 * g)


# ---- maps that give little to differentiate -----------------------------------------------------


def test_f_that_ignores_its_state() -> None:
    x = randn(B, N).requires_grad_()
    z, info = DEQ(lambda z, x: x.square())(torch.zeros(B, N, dtype=torch.float64), x)
    assert info.converged.all()
    g = randn(B, N, seed=1)
    torch.testing.assert_close(torch.autograd.grad(z, x, g)[0], 2 * x.detach() * g)


def test_f_without_anything_to_differentiate() -> None:
    constant = randn(B, N)
    for f in (lambda z: 0.5 * z + 1, lambda z: constant.clone(), lambda z: (0.5 * z).detach()):
        z, info = DEQ(f)(torch.zeros(B, N, dtype=torch.float64))
        assert info.converged.all()
        if z.requires_grad:  # f depends on z only: nothing else can receive a gradient
            z.backward(randn(B, N))


def test_partly_detached_map() -> None:
    x = randn(B, N).requires_grad_()
    deq = DEQ(lambda z, x: 0.5 * z.detach() + x, solver=TIGHT, adjoint=EXACT)
    z, _ = deq(torch.zeros_like(x), x)
    g = randn(B, N, seed=1)
    torch.testing.assert_close(torch.autograd.grad(z, x, g)[0], g)  # autograd's J is zero


def test_no_gradient_flows_to_the_start() -> None:
    start, x = randn(B, N).requires_grad_(), randn(B, N, seed=1).requires_grad_()
    for adjoint in (Implicit(), OneStep(), Neumann(), Unrolled()):
        z, _ = DEQ(Map(), adjoint=adjoint)(start, x)
        (found,) = torch.autograd.grad(z, start, randn(B, N), allow_unused=True)
        assert found is None


def test_the_same_argument_twice() -> None:
    x = randn(B, N).requires_grad_()
    f = lambda z, a, b: torch.tanh(0.4 * z * a + b)  # noqa: E731
    deq = DEQ(f, solver=TIGHT, adjoint=EXACT)
    z, _ = deq(torch.zeros(B, N, dtype=torch.float64), x, x)
    g = randn(B, N, seed=1)
    expected = dense_gradients(lambda z: f(z, x, x), z.detach(), [x], g)
    assert_gradients(list(torch.autograd.grad(z, [x], g)), expected)


def test_arguments_that_are_no_tensors() -> None:
    deq = DEQ(lambda z, table, name, power: 0.5 * z + table[name] ** power)
    x = randn(B, N).requires_grad_()
    z, _ = deq(torch.zeros_like(x), {"x": x}, "x", 2)
    assert torch.autograd.grad(z, x, randn(B, N))[0].abs().sum() > 0


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


# ---- the approximations -------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 5])
def test_truncated_gradients_equal_their_formula(k: int) -> None:
    """``u = sum_{i <= k} (J^T)^i g``, then one VJP of f at z*."""
    f, x, g = Map(), randn(B, N).requires_grad_(), randn(B, N, seed=1)
    adjoint = OneStep() if k == 0 else Neumann(k=k)
    z, _ = DEQ(f, solver=TIGHT, adjoint=adjoint)(torch.zeros(B, N, dtype=torch.float64), x)
    star = z.detach()
    jacobian = torch.func.jacrev(lambda z: f(z, x).sum(0))(star).movedim(0, 1).detach()
    u = sum(
        torch.einsum("rji,rj->ri", torch.linalg.matrix_power(jacobian, i), g) for i in range(k + 1)
    )
    expected = torch.autograd.grad(f(star, x), [x, f.weight], u)
    found = torch.autograd.grad(z, [x, f.weight], g)
    assert_gradients(list(found), list(expected), tol=1e-9)


def test_truncated_gradients_are_approximations() -> None:
    """The tests above could not tell them from Implicit if J were zero."""
    f, x, g = Map(gain=0.9), randn(B, N).requires_grad_(), randn(B, N, seed=1)
    start, grads = torch.zeros(B, N, dtype=torch.float64), []
    for adjoint in (EXACT, OneStep(), Neumann(k=2)):
        z, _ = DEQ(f, solver=TIGHT, adjoint=adjoint)(start, x)
        grads.append(torch.autograd.grad(z, x, g)[0])
    exact, one, three = grads
    assert (one - exact).norm() > (three - exact).norm() > 1e-3 * exact.norm()


# ---- precision and state ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    x = randn(B, N).to(dtype).requires_grad_()
    z, info = DEQ(lambda z, x: 0.5 * torch.tanh(z) + x)(torch.zeros_like(x), x)
    assert z.dtype == info.fuse.residual.dtype == dtype
    assert torch.autograd.grad(z, x, torch.ones_like(z))[0].dtype == dtype


def test_non_contiguous_state() -> None:
    x = randn(N, B).mT.requires_grad_()
    start = torch.zeros(N, B, dtype=torch.float64).mT
    z, info = DEQ(lambda z, x: 0.5 * torch.tanh(z) + x)(start, x)
    assert info.converged.all()
    assert torch.autograd.grad(z, x, randn(B, N))[0].shape == (B, N)


def test_the_solve_begins_at_the_start() -> None:
    """``tanh(2 z)`` has one attracting fixed point on each side of 0."""
    start = torch.tensor([[0.5], [-0.5]])
    z, _ = DEQ(lambda z: torch.tanh(2 * z))(start)
    assert z.sign().flatten().tolist() == [1, -1]
    _, info = DEQ(lambda z: torch.tanh(2 * z))(z)
    assert info.nfe.tolist() == [1, 1]


def test_the_start_is_not_written_to() -> None:
    start = randn(B, N)
    kept = start.clone()
    DEQ(Map())(start, randn(B, N))
    assert torch.equal(start, kept)


def test_info_of_a_failed_solve() -> None:
    deq = DEQ(lambda z: 3 * z + 1, solver=Picard(max_iter=5, trace=True), on_failure="ignore")
    z, info = deq(torch.zeros(2, 3))
    assert info.fuse.outcome.tolist() == [Outcome.MAX_ITER] * 2
    assert not info.converged.any()
    assert info.fuse.trace is not None
    assert info.fuse.trace.shape == (5, 2)
    assert z.shape == (2, 3)
    assert info.backend == "reference"


def test_help_text_names_the_options() -> None:
    text = repr(DEQ(Map(), solver=Anderson(tol=0.125)))
    assert "Map" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("linear", LINEAR_SOLVERS)
def test_sixteen_bit_state_is_solved_in_float32(dtype: torch.dtype, linear: str) -> None:
    x = randn(B, N).to(dtype).requires_grad_()
    deq = DEQ(lambda z, x: 0.25 * torch.tanh(z) + x, solver=Anderson(tol=1e-2),
              adjoint=Implicit(solver=linear, tol=1e-2))  # fmt: skip
    z, info = deq(torch.zeros_like(x), x)
    assert info.converged.all()
    assert (z.dtype, info.fuse.residual.dtype) == (dtype, torch.float32)
    (grad,) = torch.autograd.grad(z, x, torch.ones_like(z))
    exact = 1 / (1 - 0.25 * (1 - z.detach().double().tanh() ** 2))
    torch.testing.assert_close(grad.double(), exact, rtol=0.05, atol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_a_map_that_works_in_place(grad: bool) -> None:
    """It must not overwrite the solver's state: f(z) - z would be 0 and every row converged."""
    x = randn(B, N)
    with torch.set_grad_enabled(grad):
        z, info = DEQ(lambda z, x: z.mul_(0.5).add_(x), solver=TIGHT)(torch.zeros_like(x), x)
    assert info.converged.all()
    torch.testing.assert_close(z, 2 * x)


def test_the_answer_may_be_changed_in_place() -> None:
    x = randn(B, N).requires_grad_()
    start = torch.zeros(B, N, dtype=torch.float64)
    z, _ = DEQ(lambda z, x: 0.5 * z + x, solver=TIGHT, adjoint=EXACT)(start, x)
    z.mul_(3)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], torch.full_like(x, 6))
