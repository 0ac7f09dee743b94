"""The compiled operators of the whole layer, against their blocks and the reference."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from cpu_cases import (
    LOOSE,
    TIGHT,
    Case,
    as_reference,
    assert_equal,
    assert_same_solution,
    named,
)
from cpu_layer_cases import (
    EXACT,
    PRECISE,
    WIDTHS,
    assert_near,
    draw,
    each_variant,
    gradients,
    injections,
    layer_of,
    optional,
    problem,
    solve,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import weight_norm

from deqfuse import Anderson, DEQFusion, Implicit, Outcome
from deqfuse.backends import cpu, cpu_native
from deqfuse.backends.arguments import adjoint_numbers
from deqfuse.backends.layer import LayerParams
from deqfuse.backends.maps import VARIANTS
from deqfuse.result import BlockInfo

ops = torch.ops.deqfuse

# ---- forward -------------------------------------------------------------------------------------

GRID = [
    *(Case(r, 20, 4, n, dtype=t) for r in (0, 1, 17, 70) for n in range(1, 5) for t in PRECISE),
    *(Case(9, d, g, 3, v, t) for (d, g), v, t in itertools.product(WIDTHS, VARIANTS, PRECISE)),
    *(Case(33, 20, 4, variant=v, dtype=t) for v in VARIANTS for t in ("bf16", "f16")),
]


@optional
@pytest.mark.parametrize("case", **named(GRID))
def test_a_solve_is_that_of_its_blocks_bit_for_bit(case, full):
    """At torch's init, where rows end in every way."""
    solver = Anderson(tol=1e-4, max_iter=25, trace=True, rescue=False)
    call = problem(case, full, init="torch")
    xs, params, mask, z0_fuse, z0_cells = call
    z, states, *statistics = solve(case, call, solver)
    split, how = LayerParams.split(params, case.n), (case.groups, VARIANTS[case.variant], solver)
    cells = cpu.solve_cells(torch.stack(xs), split.cells, z0_cells, *how)
    both = injections(xs, split.weights, split.bias, cells.z)
    fuse = cpu.solve_fuse(*both, split.fuse, mask, z0_fuse, case.n, *how)
    expected = [torch.cat([c, f[None]]) for c, f in zip(cells[:4], fuse[:4], strict=True)]
    assert z.dtype == states.dtype == cells.z.dtype
    assert_equal([z, states], [fuse.z, expected[0]])
    trace = torch.cat([cells.trace, fuse.trace[:, None]], 1)
    assert_equal(statistics, [*expected[1:], trace])
    assert trace.shape == (25, case.n + 1, case.rows)


@optional
@pytest.mark.parametrize("case", **named(c for c in GRID if c.rows > 1))
def test_solves_agree_with_the_reference(case, full):
    call = problem(case, full)

    def run(solver, backend: str) -> tuple:
        _, states, residual, nfe, outcome, _ = solve(case, call, solver, backend)
        return states, BlockInfo(residual, nfe, outcome, None), backend

    # Counts are those of the blocks, as the test before shows.
    solver = TIGHT if case.dtype == "f64" else LOOSE
    assert_same_solution(run, solver, steps=None, share=0.98, wanted=as_reference)


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rescued_rows_are_those_of_the_blocks_bit_for_bit(variant, dtype):
    """A row's fuse step sees the rescued cells, and counts what it took to get there."""
    case = Case(40, variant=variant, dtype=dtype, init="torch")
    tol = 1e-8 if dtype == "f64" else 1e-4
    solver = Anderson(tol=tol, max_iter=10, trace=True)
    call = problem(case, True, init="torch")
    xs, params, mask, z0_fuse, z0_cells = call
    z, states, residual, nfe, outcome, trace = solve(case, call, solver)
    split, how = LayerParams.split(params, case.n), (case.groups, VARIANTS[case.variant], solver)
    cells = cpu.solve_cells(torch.stack(xs), split.cells, z0_cells, *how)
    both = injections(xs, split.weights, split.bias, cells.z)
    fuse = cpu.solve_fuse(*both, split.fuse, mask, z0_fuse, case.n, *how)
    assert (outcome[:-1] == Outcome.RESCUED).any()
    assert (outcome[-1] == Outcome.RESCUED).any()
    expected = [torch.cat([c, f[None]]) for c, f in zip(cells[:4], fuse[:4], strict=True)]
    assert_equal([z, states, residual, outcome], [fuse.z, *(expected[k] for k in (0, 1, 3))])
    anew = (outcome[:-1] == Outcome.RESCUED).any(0)
    assert_equal([nfe[:-1], nfe[-1][~anew]], [cells.nfe, fuse.nfe[~anew]])
    assert (nfe[-1][anew] > fuse.nfe[anew]).all()
    assert_equal([trace], [torch.cat([cells.trace, fuse.trace[:, None]], 1)])


# ---- operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "dtype"), [(3, "f64"), (0, "f64"), (3, "bf16")])
@pytest.mark.parametrize("full", [True, False], ids=["full", "minimal"])
@pytest.mark.parametrize("operator", ["solve_layer", "adjoint_layer"])
def test_opcheck(operator, full, rows, dtype):
    """Results in memory of their own, and fake ones of the same shapes, among others."""
    case = Case(rows, variant="released" if full else "paper", dtype=dtype)
    call, code = problem(case, full), (case.groups, case.variant)
    solver, adjoint = (TIGHT, EXACT["adjoint"]) if dtype == "f64" else (LOOSE, Implicit())
    states = solve(case, call, solver)[1]
    xs, params, mask, *_ = call
    if operator == "solve_layer":
        for t in (*xs, *params):
            t.requires_grad_(rows > 0)
        present = torch.arange(case.n * rows).reshape(case.n, rows, 1) % 4 > 0 if full else None
        call = (*call, present, *code, solver.code, adjoint.code, "cpu", "ignore")
    else:
        g, option = torch.randn_like(states), (*code, adjoint.code, "cpu", full)
        call = (g[0], g[1:] if full else None, states, xs, params, mask, None, *option)
    result = torch.library.opcheck(getattr(ops, operator), call)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_pass_the_layer_in_eager_mode(dtype):
    options = {"dropout": 0.1, "on_failure": "ignore", "backend": "cpu", "variant": "released"}
    layer = DEQFusion(20, 3, solver=Anderson(trace=True), **options).to(dtype)
    with FakeTensorMode() as mode:
        params = {name: mode.from_tensor(p) for name, p in layer.named_parameters()}
        xs = [torch.randn(2, 7, 20, dtype=dtype, requires_grad=True) for _ in range(3)]
        call = functools.partial(torch.func.functional_call, layer, params, (xs,))
        with torch.no_grad():
            assert call().shape == (2, 7, 20)
        z, zs, info = call({"return_cells": True, "return_info": True})
        (z.sum() + zs.sum()).backward()
    assert (z.shape, zs.shape) == ((2, 7, 20), (3, 2, 7, 20))
    assert (info.fuse.nfe.shape, info.cells.outcome.shape) == ((2, 7), (3, 2, 7))
    assert (info.fuse.trace.shape, info.cells.trace.shape) == ((50, 2, 7), (50, 3, 2, 7))
    assert z.dtype == zs.dtype == dtype
    for leaf in (*xs, *params.values()):
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, dtype)


@each_variant
def test_the_compiled_layer_is_the_eager_one(variant):
    torch._dynamo.reset()
    case = Case(9, variant=variant)
    layer, (xs, g) = layer_of(case), draw(case)
    call = functools.partial(layer, return_cells=True)
    compiled = torch.compile(lambda xs: call(xs), fullgraph=True, backend="aot_eager")
    leaves = [*xs, *layer.parameters()]
    outputs = compiled(xs), call(xs)
    assert_equal(*outputs)
    assert_equal(*(torch.autograd.grad(out, leaves, (g[0], g[1:])) for out in outputs))
    torch._dynamo.reset()


def test_functional_call_uses_and_differentiates_what_it_is_given():
    case = Case(9, variant="released")
    layer, (xs, g) = layer_of(case), draw(case)
    given = {k: (1.1 * p + 0.01).detach() for k, p in layer.named_parameters()}
    for t in given.values():
        t.requires_grad_()
    z = torch.func.functional_call(layer, given, (xs,))
    grads = torch.autograd.grad(z, [*given.values(), *xs], g[0])
    before = layer(xs).detach()
    layer.load_state_dict(given)
    expected = layer(xs)
    assert not torch.equal(expected, before)
    assert_equal([z], [expected])
    assert_equal(grads, torch.autograd.grad(expected, [*layer.parameters(), *xs], g[0]))


def test_parametrised_weights():
    case, found = Case(9, variant="released"), []
    xs, g = draw(case)
    for backend in ("cpu", "reference"):
        layer = layer_of(case, backend=backend)
        plain = layer(xs).detach()
        linears = [layer.cells[1].linear2, layer.combine.gate]
        for linear in linears:
            weight_norm(linear)
        torch.testing.assert_close(layer(xs), plain, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            for linear in linears:
                linear.parametrizations.weight.original0.mul_(0.5)
        assert (layer(xs) - plain).abs().max() > 1e-4
        found.append(gradients(layer, xs, g))
    assert_near(*found, 1e-8)
    originals = [grad for name, grad in found[0].items() if ".parametrizations." in name]
    assert len(originals) == 4
    assert all(grad.any() for grad in originals)


def test_wrong_sizes_are_refused_by_the_kernels():
    case = Case(5, variant="released")
    call, g = problem(case, True), draw(case)[1]
    (xs, params, mask, *_), states = call, solve(case, call)[1]
    how = (case.groups, True, False)

    def forward(*tensors) -> None:
        cpu_native.solve_layer(*tensors, None, *how, *cpu._forward(TIGHT), 0)

    def backward(*tensors) -> None:
        g, more, states, xs, params, mask = tensors
        cpu_native.adjoint_layer(
            g, more, states, xs, params, True, mask, None, *how, *adjoint_numbers(Implicit())
        )

    refused = 0
    for run, given in ((forward, call), (backward, (g[0], g[1:], states, xs, params, mask))):
        run(*given)
        for at, value in enumerate(given):
            for k, right in enumerate(value) if isinstance(value, list) else [(None, value)]:
                # Longer in the first dimension, from which no operator reads a size; or shorter.
                more = torch.cat([right, right[:1]]) if right.dim() else right.repeat(2)
                for wrong in (more, right[1:] if right.dim() else right.new_empty(0)):
                    broken = wrong if k is None else [*value[:k], wrong, *value[k + 1 :]]
                    with pytest.raises(RuntimeError, match="contiguous values of the compute"):
                        run(*given[:at], broken, *given[at + 1 :])
                    refused += 1
    assert refused == 2 * (2 * (case.n + len(params)) + 3 + 4)


# ---- rows ----------------------------------------------------------------------------------------


def answer(layer: DEQFusion, xs: list[Tensor], g: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """z, zs, statistics and dx, rows first; then the parameters' gradients."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    z, zs, info = layer(xs, return_cells=True, return_info=True)
    grads = torch.autograd.grad((z, zs), [*xs, *layer.parameters()], (g[0], g[1:]))
    rows = [z, *zs, info.fuse.nfe, info.fuse.outcome, info.cells.nfe.T, *grads[: len(xs)]]
    return [t.detach() for t in rows], list(grads[len(xs) :])


def loose_layer(dtype: str, init: str = "torch") -> tuple[DEQFusion, list[Tensor], Tensor]:
    case = Case(150, 20, 4, 3, "released", dtype, init)
    xs, g = draw(case, False)
    return layer_of(case, solver=Anderson(max_iter=25), adjoint=Implicit()), xs, g


@pytest.mark.parametrize("dtype", PRECISE)
def test_a_row_is_the_same_in_any_company(dtype, threads):
    layer, xs, g = loose_layer(dtype)
    together, _ = answer(layer, xs, g)
    assert len(together[-6].unique()) > 1, "all rows ended alike: no lane was refilled"
    order = torch.randperm(150, generator=torch.Generator().manual_seed(4))
    parts = [slice(r, r + 1) for r in (0, 1, 63, 64, 77, 149)]
    for count, part in itertools.product((1, 3), [*parts, slice(5, 22), slice(60, 150), order]):
        threads(count)
        alone, _ = answer(layer, [x[part] for x in xs], g[:, part])
        assert_equal(alone, [t[part] for t in together])


@pytest.mark.parametrize("dtype", PRECISE)
def test_no_answer_depends_on_the_number_of_threads(dtype, threads):
    layer, xs, g = loose_layer(dtype, "contractive")
    found = []
    for count in (1, 2, 3, 64):
        threads(count)
        rows, params = answer(layer, xs, g)
        assert all(p.isfinite().all() and p.any() for p in params)
        found.append(rows + params)
    for other in found[1:]:
        assert_equal(other, found[0])


@pytest.mark.parametrize("poisoned", ["features", "cotangent of z", "cotangent of a cell"])
def test_nan_stays_in_its_row(poisoned):
    layer, xs, g = loose_layer("f32", "contractive")
    clean, _ = answer(layer, xs, g)
    bad, others = 70, [row for row in range(150) if row != 70]
    target = {"features": xs[1], "cotangent of z": g[0], "cotangent of a cell": g[2]}[poisoned]
    target[bad, 3] = torch.nan
    dirty, _ = answer(layer, xs, g)
    assert_equal([t[others] for t in dirty], [t[others] for t in clean])
    assert dirty[-2][bad].isnan().any()
    if poisoned == "features":
        assert dirty[0][bad].isnan().any()
        assert dirty[-5][bad] == Outcome.NON_FINITE
    else:
        assert_equal([t[bad] for t in dirty[:-3]], [t[bad] for t in clean[:-3]])
