"""``torch.func`` on the layer: vmap, grad, vjp, jacrev are right; forward mode is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from devices import every_device, own_backend  # noqa: F401 - autouse
from parameters import scatter_injection, scatter_norms
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from deqfuse import (
    DEQ,
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    DEQFusion,
    Implicit,
    NewtonKrylov,
)
from deqfuse.backends import cpu_native
from deqfuse.errors import DoubleBackwardError

ops = torch.ops.deqfuse

BACKENDS = ["reference"] + (["compiled"] if cpu_native.module is not None else [])
DIM, N, ROWS, CALLS = 8, 2, 3, 4
TIGHT = {
    "solver": Anderson(tol=1e-11, max_iter=200),
    "adjoint": Implicit(tol=1e-11, max_iter=200),
}
# The paper's layer is one operator; an ablation without its combination, or without its cells, is
# the operator of the other block.
BLOCKS = {"layer": {}, "cells": {"combine": "sum"}, "fuse": {"cell": "identity"}}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_block = pytest.mark.parametrize("block", BLOCKS)


def make(backend: str, block: str = "layer", **options) -> DEQFusion:
    torch.manual_seed(0)
    given = {"num_groups": 2, "backend": own_backend(backend), **TIGHT, **BLOCKS[block], **options}
    layer = DEQFusion(DIM, N, **given).double()
    scatter_norms(layer)
    scatter_injection(layer)
    return layer


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


def close(given, expected) -> None:
    """Both sides are solved to 1e-11; their gradients are a few hundred times less exact."""
    torch.testing.assert_close(given, expected, rtol=1e-7, atol=1e-8)


# ---- vmap ----------------------------------------------------------------------------------------


@each_backend
@each_block
@pytest.mark.parametrize("no_grad", [True, False], ids=["no_grad", "grad"])
def test_mapped_features_are_more_rows(backend, block, no_grad):
    layer, x = make(backend, block), draw(CALLS, N, ROWS)
    expected = torch.stack([layer(list(call)) for call in x])
    with torch.set_grad_enabled(not no_grad):
        for dim in range(3):  # wherever the mapped dimension lies
            close(vmap(lambda x: layer(list(x)), dim)(x.movedim(0, dim)), expected)
        # one feature is shared by all calls, and calls have one row each
        shared = vmap(lambda a, b: layer([a, b]), (0, None))(x[:, 0], x[0, 1])
        close(shared, torch.stack([layer([a, x[0, 1]]) for a in x[:, 0]]))
        close(vmap(lambda x: layer(list(x)), 1)(x[0]), expected[0])


@each_backend
def test_nested_maps_starts_and_cells(backend):
    layer, x = make(backend), draw(CALLS, 2, N, ROWS)
    start = draw(CALLS, ROWS), draw(CALLS, N, ROWS)

    def call(x: Tensor, z: Tensor, zs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, zs, info = layer(list(x), z0=(z, zs), return_cells=True, return_info=True)
        return z, zs, info.nfe

    given = vmap(vmap(call, (0, None, None)))(x, *start)
    expected = [[call(x[i, j], start[0][i], start[1][i]) for j in range(2)] for i in range(CALLS)]
    for k, t in enumerate(given):
        assert t.shape[:2] == (CALLS, 2)
        for i in range(CALLS):
            for j in range(2):
                close(t[i, j], expected[i][j][k])


@each_backend
@each_block
@pytest.mark.parametrize("features", [0, None], ids=["own_features", "shared_features"])
def test_an_ensemble_of_layers(backend, block, features):
    layers = [make(backend, block) for _ in range(CALLS)]
    for i, layer in enumerate(layers):
        with torch.no_grad():
            for p in layer.parameters():
                p.mul_(1 + 0.1 * i)
    x = draw(CALLS, N, ROWS) if features == 0 else draw(N, ROWS)
    state, _ = stack_module_state(layers)
    base = copy.deepcopy(layers[0])

    def call(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, state, (list(x),))

    given = vmap(call, (0, features))(state, x)
    each = x if features == 0 else x.expand(CALLS, *x.shape)
    expected = torch.stack([layer(list(own)) for layer, own in zip(layers, each, strict=True)])
    close(given, expected)
    g = torch.randn_like(given)
    stacked = torch.autograd.grad(given, list(state.values()), g, allow_unused=True)
    for name, grads in zip(state, stacked, strict=True):
        single = [
            torch.autograd.grad(expected, layer.get_parameter(name), g, retain_graph=True,
                                allow_unused=True)[0]
            for layer in layers
        ]  # fmt: skip
        assert (grads is None) == (single[0] is None)
        if grads is not None:
            close(grads, torch.stack(single))


def test_a_mapped_solve_reports_its_failures():
    layer, x = (
        make("reference", solver=Anderson(tol=1e-11, max_iter=2, rescue=False)),
        draw(CALLS, N, ROWS),
    )
    rows = CALLS * ROWS
    with (
        pytest.warns(ConvergenceWarning, match=f"of {rows} rows of the fuse block"),
        pytest.warns(ConvergenceWarning, match=f"of {N * rows} rows of the modality cells"),
    ):
        vmap(lambda x: layer(list(x)))(x)
    layer.on_failure = "raise"
    with pytest.raises(ConvergenceError, match="the modality cells"):
        vmap(lambda x: layer(list(x)))(x)
    layer.solver, layer.adjoint = TIGHT["solver"], Implicit("gmres", tol=1e-11, max_iter=2)
    with pytest.raises(ConvergenceError, match=f"of {rows} rows of the backward solve"):
        vmap(grad(lambda x: layer(list(x)).pow(3).sum()))(x)


# ---- grad, vjp, jacrev ---------------------------------------------------------------------------


@each_backend
@each_block
def test_gradients_by_transforms_are_those_of_backward(backend, block):
    layer, x, g = make(backend, block), list(draw(N, ROWS)), draw(ROWS)
    params = dict(layer.named_parameters())

    def loss(params: dict[str, Tensor], x: list[Tensor]) -> Tensor:
        return (functional_call(layer, params, (x,)) * g).sum()

    def value(x: list[Tensor]) -> Tensor:
        return layer(x)

    given = grad(loss, argnums=(0, 1))(params, x)
    for t in x:
        t.requires_grad_()
    leaves = [*params.values(), *x]
    expected = torch.autograd.grad(loss(params, x), leaves)
    close([*given[0].values(), *given[1]], list(expected))

    z, pull = vjp(value, x)
    close(z, layer(x))
    close(list(pull(g)[0]), list(expected[-N:]))


@each_backend
@each_block
def test_jacobians(backend, block):
    layer, x = make(backend, block), list(draw(N, ROWS))

    def call(first: Tensor) -> Tensor:
        return layer([first, *x[1:]])

    x[0].requires_grad_()
    expected = torch.autograd.functional.jacobian(call, x[0])
    close(jacrev(call)(x[0]), expected)
    close(jacrev(call, chunk_size=1)(x[0].detach()), expected)


@each_backend
def test_gradients_per_sample(backend):
    layer, x, g = make(backend, variant="released"), draw(N, ROWS), draw(ROWS)
    params = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, g: Tensor) -> Tensor:
        z, zs = functional_call(layer, params, (list(x),), {"return_cells": True})
        return (z * g).sum() + zs.pow(3).sum()

    given = vmap(grad(loss), (None, 1, 0))(params, x, g)
    for i in range(ROWS):
        own = {name: p.clone().requires_grad_() for name, p in params.items()}
        expected = torch.autograd.grad(loss(own, x[:, i : i + 1], g[i]), list(own.values()))
        close([t[i] for t in given.values()], list(expected))


@each_backend
def test_a_loss_on_the_cells_alone(backend):
    layer, x = make(backend), draw(N, ROWS)

    def loss(x: Tensor) -> Tensor:
        return layer(list(x), return_cells=True)[1].pow(3).sum()

    given = grad(loss)(x)
    x.requires_grad_()
    close(given, *torch.autograd.grad(loss(x), x))


@each_backend
@each_block
def test_second_derivatives_are_refused_by_name(backend, block):
    layer, x = make(backend, block), list(draw(N, ROWS))

    def loss(first: Tensor) -> Tensor:
        return layer([first, *x[1:]]).pow(3).sum()

    with pytest.raises(DoubleBackwardError):
        grad(lambda t: grad(loss)(t).pow(2).sum())(x[0])
    with pytest.raises(DoubleBackwardError):
        jacrev(jacrev(loss))(x[0])


# ---- forward mode --------------------------------------------------------------------------------


def dual(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        call(forward_ad.make_dual(x, torch.ones_like(x)))


@each_backend
@each_block
@pytest.mark.parametrize("no_grad", [True, False], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    "differentiate",
    [dual, lambda f, x: jvp(f, (x,), (x,)), lambda f, x: jacfwd(f)(x)],
    ids=["dual", "jvp", "jacfwd"],
)
def test_forward_mode_is_refused(backend, block, no_grad, differentiate):
    """Without these errors the tangent is dropped, and the derivative is zero."""
    layer, x = make(backend, block), list(draw(N, ROWS))
    message = "forward-mode differentiation .* Remedy: torch.func.vjp"
    with torch.set_grad_enabled(not no_grad), pytest.raises(NotImplementedError, match=message):
        differentiate(lambda first: layer([first, *x[1:]]), x[0])


def test_forward_mode_may_pass_by():
    """A dual level that none of the layer's tensors belongs to is nobody's business."""
    layer, x = make("reference"), list(draw(N, ROWS))
    expected = layer(x)
    with forward_ad.dual_level():
        close(layer(x), expected)


@pytest.mark.parametrize("solver", [Anderson(), NewtonKrylov()], ids=repr)
def test_an_equilibrium_of_any_map_is_refused(solver):
    deq, x = DEQ(lambda z, x: torch.tanh(0.1 * z + x), solver=solver), draw(CALLS, ROWS)

    def solve(x: Tensor) -> Tensor:
        return deq(torch.zeros_like(x), x)[0]

    calls = (
        lambda: vmap(solve)(x),
        lambda: grad(lambda x: solve(x).sum())(x[0]),
        lambda: jvp(solve, (x[0],), (x[0],)),
        lambda: dual(solve, x[0]),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"DEQ\(f\) inside torch.func"):
            call()


# ---- operators -----------------------------------------------------------------------------------


@each_backend
@each_block
def test_operators_take_any_memory_layout(backend, block):
    """What comes out of a transform, or out of a compiler, need not be contiguous."""
    layer, x, g = make(backend), draw(N, ROWS), draw(N, ROWS)
    cells = [t.detach() for cell in layer.cells for t in cell.flat()]
    fuse = [t.detach() for t in layer.combine.flat()]
    own = own_backend(backend)
    code = (2, "paper", layer.solver.code, layer.adjoint.code, own, "raise")
    how = (2, "paper", layer.adjoint.code, own, True)
    rest: tuple = how
    if block == "cells":
        z = ops.solve_cells(x, cells, None, *code)[0]
        adjoint, tensors = ops.adjoint_cells, (g, z, x, cells)
    elif block == "fuse":
        z = ops.solve_fuse(x[0], x[1], fuse, None, None, N, *code)[0]
        adjoint, tensors, rest = ops.adjoint_fuse, (g[0], z, x[0], x[1], fuse, None), (N, *how)
    else:
        params = [*cells, *fuse, layer.modality_weights.detach()]
        states = ops.solve_layer(list(x), params, None, None, None, *code)[1]
        adjoint, tensors = ops.adjoint_layer, (g[0], g, states, list(x), params, None)

    def spread(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]

    def each(value: list[Tensor] | Tensor | None) -> list[Tensor] | Tensor | None:
        if isinstance(value, list):
            return [spread(t) for t in value]
        return None if value is None else spread(value)

    expected = adjoint(*tensors, *rest)
    given = adjoint(*(each(t) for t in tensors), *rest)
    for a, b in zip(given, expected, strict=True):
        close(a, b)


@each_backend
@each_block
def test_what_is_left_over_from_a_transform_is_seen_through(backend, block):
    layer, kept = make(backend, block), []
    leaf, other, g = draw(ROWS).requires_grad_(), draw(ROWS), draw(ROWS)
    grad(lambda x: (kept.append(2 * x), x.sum())[1])(leaf)
    for features in ([2 * leaf, other], [kept[0], other]):
        layer(features).backward(g)
    expected = torch.autograd.grad(layer([2 * leaf, other]), leaf, g)[0]
    close(leaf.grad, 2 * expected)


# ---- fake tensors --------------------------------------------------------------------------------


@each_backend
@each_block
@pytest.mark.parametrize("on_failure", ["warn", "raise"])
def test_fake_tensors_have_shapes_and_nothing_to_report(backend, block, on_failure):
    with FakeTensorMode(), warnings.catch_warnings():
        own = own_backend(backend)
        layer = DEQFusion(DIM, N, backend=own, on_failure=on_failure, **BLOCKS[block])
        x = [torch.randn(ROWS, DIM, requires_grad=True) for _ in range(N)]
        z, info = layer(x, return_info=True)
        z.sum().backward()
        with torch.no_grad():
            assert layer(x).shape == (ROWS, DIM)
    assert (z.shape, info.fuse.nfe.shape, info.cells.nfe.shape) == (
        (ROWS, DIM),
        (ROWS,),
        (N, ROWS),
    )
    assert all(t.grad.shape == t.shape for t in x)
