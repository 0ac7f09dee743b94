"""The compiled operators of the whole layer, against their blocks and the reference."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from cpu_cases import DTYPES, LOOSE, TIGHT, Case, assert_equal, assert_same_solution, named
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import weight_norm

from deqfuse import Anderson, DEQFusion, Implicit, Outcome, ops
from deqfuse.backends import cpu, native
from deqfuse.backends.arguments import adjoint_numbers
from deqfuse.backends.layer import LayerParams
from deqfuse.backends.maps import VARIANTS
from deqfuse.errors import DoubleBackwardError
from deqfuse.result import BlockInfo

EXACT = {"solver": Anderson(tol=1e-12, max_iter=500), "adjoint": Implicit(tol=1e-12, max_iter=500)}
RELEASED = Case(variant="released")
each_variant = pytest.mark.parametrize("variant", VARIANTS)
optional = pytest.mark.parametrize("full", [False, True], ids=["plain", "mask,warm"])


def layer_of(case: Case, **options) -> DEQFusion:
    """Also the parameters of the injection are away from their initial ones and zero."""
    layer = case.layer(**{"backend": "cpu", **EXACT, **options})
    with torch.no_grad():
        layer.modality_weights.uniform_(0.5, 1.5)
        if layer.injection_bias is not None:
            layer.injection_bias.fill_(0.3)
    return layer


def flat(layer: DEQFusion) -> list[Tensor]:
    params = [t for part in (*layer.cells, layer.combine) for t in part.flat()]
    return [t for t in (*params, layer.modality_weights, layer.injection_bias) if t is not None]


def draw(case: Case, grad: bool = True) -> tuple[list[Tensor], Tensor]:
    """Features, and a cotangent of (z, zs), the same at every call."""
    torch.manual_seed(1)
    xs = [case.draw().requires_grad_(grad) for _ in range(case.n)]
    return xs, case.draw(case.n + 1)


def problem(case: Case, full: bool, **options) -> tuple:
    """Arguments of the operator up to the groups; ``full``: with mask and warm start."""
    params, (xs, more) = [t.detach() for t in flat(layer_of(case, **options))], draw(case, False)
    mask = 1.25 * (more[-1] > -0.8).to(more.dtype)
    return xs, params, *((mask, more[0], 0.3 * more[1:]) if full else (None, None, None))


def solve(case: Case, call: tuple, solver=TIGHT, backend: str = "cpu"):
    code = (solver.code, Implicit().code, backend, "ignore")
    return ops.solve_layer(*call, case.groups, case.variant, *code)


def injections(xs: list[Tensor], weights: Tensor, bias: Tensor | None, zs: Tensor) -> list[Tensor]:
    """``sum_i w_i x_i + bias`` and ``sum_i z_i``, in the operator's order of summation."""
    weights = weights.to(zs.dtype)
    x_fuse = sum((w * x.to(zs.dtype) for w, x in zip(weights, xs, strict=True)), torch.zeros(()))
    return [x_fuse if bias is None else x_fuse + bias.to(zs.dtype), sum(zs, torch.zeros(()))]


# ---- forward -------------------------------------------------------------------------------------

PRECISE = ("f64", "f32")
WIDTHS = ((12, 4), (20, 4), (64, 4), (130, 5))
GRID = [
    *(Case(r, 20, 4, n, dtype=t) for r in (0, 1, 17, 70) for n in range(1, 5) for t in PRECISE),
    *(Case(9, d, g, 3, v, t) for (d, g), v, t in itertools.product(WIDTHS, VARIANTS, PRECISE)),
    *(Case(33, 20, 4, variant=v, dtype=t) for v in VARIANTS for t in ("bf16", "f16")),
]


@optional
@pytest.mark.parametrize("case", **named(GRID))
def test_a_solve_is_that_of_its_blocks_bit_for_bit(case, full):
    """At torch's init, where rows end in every way."""
    solver = Anderson(tol=1e-4, max_iter=25, trace=True)
    call = problem(case, full, init="torch")
    xs, params, mask, z0_fuse, z0_cells = call
    z, states, *statistics = solve(case, call, solver)
    split, how = LayerParams.split(params, case.n), (case.groups, case.variant, solver)
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

    assert_same_solution(run, TIGHT if case.dtype == "f64" else LOOSE, share=0.98)


def test_rescue_goes_through_and_agrees():
    case, found = Case(rows=40, variant="released", init="torch"), {}
    xs, g = draw(case)
    for backend in ("cpu", "reference"):
        solver = Anderson(max_iter=10, tol=1e-9, rescue=True, trace=True)
        layer = layer_of(case, solver=solver, backend=backend)
        z, info = layer(xs, return_info=True)
        assert info.backend == backend
        assert info.fuse.trace.shape[0] == solver.trace_length
        found[backend] = [z, info.converged, *torch.autograd.grad(z, xs, g[0])]
    plain = layer_of(case, solver=Anderson(max_iter=10, tol=1e-9))(xs, return_info=True)[1]
    agree = found["cpu"][1] & found["reference"][1]
    assert agree.sum() > plain.converged.sum()
    for i, limit in ((0, 1e-6), (2, 1e-3), (3, 1e-3)):
        a, b = (found[backend][i][agree] for backend in found)
        near = (a - b).norm(dim=-1) <= limit * b.norm(dim=-1)
        assert near.double().mean() > 0.9, "other equilibria are rare"


# ---- gradients -----------------------------------------------------------------------------------

LOSSES = ("z", "cells", "both")


def gradients(layer: DEQFusion, xs: list[Tensor], g: Tensor, loss: str = "both") -> dict:
    """By name, for whatever requires a gradient."""
    z, zs = layer(xs, return_cells=True)
    outputs = {"z": [z], "cells": [zs], "both": [z, zs]}[loss]
    cotangents = {"z": [g[0]], "cells": [g[1:]], "both": [g[0], g[1:]]}[loss]
    leaves = {f"x{i}": x for i, x in enumerate(xs)} | dict(layer.named_parameters())
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(  # a loss on the cells alone does not use the fuse step
        outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, grads, strict=True))


def assert_near(given: dict, expected: dict, limit: float) -> None:
    scale = 1e-4 * max(float(e.abs().max()) for e in expected.values())
    assert given.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (given[name].shape, given[name].dtype) == (wanted.shape, wanted.dtype), name
        error = (given[name] - wanted).abs().max() / max(wanted.abs().max(), scale)
        assert error <= limit, (name, float(error))


def on_both(case: Case, loss: str = "both", **options) -> list[dict]:
    (xs, g), found = draw(case), []
    for backend in ("cpu", "reference"):
        layer = layer_of(case, backend=backend, **options)
        torch.manual_seed(2)  # the same dropout mask
        found.append(gradients(layer, xs, g, loss))
    return found


GRADIENTS = [
    *(Case(r, n=n, variant="released") for r in (1, 17, 70) for n in range(1, 5)),
    *(Case(9, d, g, variant=v) for (d, g), v in itertools.product(WIDTHS[:3], VARIANTS)),
    Case(5, 130, 5, variant="released"),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", **named(GRADIENTS))
def test_gradients_agree_with_the_reference(case, loss):
    given, expected = on_both(case, loss)
    assert_near(given, expected, 1e-8)
    fused = ("combine.", "modality_weights", "injection_bias")
    for name, grad in given.items():  # the fuse step is not behind the cells
        assert bool(grad.any()) == (loss != "cells" or not name.startswith(fused)), name


@each_variant
def test_gradients_of_masked_rows_agree(variant):
    assert_near(*on_both(Case(20, 20, 4, variant=variant), dropout=0.4), 1e-8)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_gradients_in_low_precision_agree(dtype):
    case = Case(33, variant="released", dtype=dtype)
    limit = 3e-3 if dtype == "f32" else 8 * torch.finfo(DTYPES[dtype]).eps
    assert_near(*on_both(case, solver=LOOSE, adjoint=Implicit(tol=1e-5)), limit)


def test_the_adjoint_is_that_of_its_blocks_bit_for_bit():
    case, option = Case(70, 20, 4, 3, "released"), Implicit()
    call, g = problem(case, True), draw(case)[1]
    (xs, params, mask, *_), states = call, solve(case, call)[1]
    zs, z, split = states[:-1], states[-1], LayerParams.split(params, case.n)
    how = (case.groups, case.variant, option, True)
    both = injections(xs, split.weights, split.bias, zs)
    dx_fuse, dsum, dfuse, fuse = cpu.adjoint_fuse(g[0], z, *both, split.fuse, mask, case.n, *how)
    for more in (None, g[1:]):
        dx, grads, *statistics = cpu.adjoint_layer(g[0], more, states, xs, params, mask, *how)
        owed = dsum.expand_as(zs) if more is None else more + dsum
        dcells, cell_grads, cells = cpu.adjoint_cells(owed, zs, torch.stack(xs), split.cells, *how)
        assert_equal(dx, [d + w * dx_fuse for d, w in zip(dcells, split.weights, strict=True)])
        assert_equal(grads[:-2], cell_grads + dfuse)
        torch.testing.assert_close(grads[-2], torch.stack([(x * dx_fuse).sum() for x in xs]))
        torch.testing.assert_close(grads[-1], dx_fuse.sum()[None])
        expected = [torch.cat([c, f[None]]) for c, f in zip(cells, fuse, strict=True)]
        assert_equal(statistics[0], expected)


def test_only_what_is_asked_for_is_given_and_the_same():
    case = Case(33, variant="released")
    layer, (xs, g) = layer_of(case), draw(case)
    everything = gradients(layer, xs, g)
    layer.cells[0].linear1.weight.requires_grad_(False)
    xs[1].requires_grad_(False)
    subsets = [gradients(layer, xs, g)]
    assert len(subsets[0]) == len(everything) - 2
    subsets.append(gradients(layer, [x.detach() for x in xs], g))
    layer.requires_grad_(False)
    subsets.append(gradients(layer, xs, g))
    assert set(subsets[2]) == {"x0"}
    layer.injection_bias.requires_grad_()
    subsets.append(gradients(layer, [x.detach() for x in xs], g))
    for subset in subsets:
        assert_equal(list(subset.values()), [everything[name] for name in subset])


@each_variant
def test_gradcheck(variant):
    case = Case(2, 8, 2, variant=variant)
    solver, adjoint = Anderson(tol=1e-13, max_iter=500), Implicit(tol=1e-13, max_iter=500)
    layer, (xs, _) = layer_of(case, solver=solver, adjoint=adjoint), draw(case)
    names, params = zip(*layer.named_parameters(), strict=True)

    def call(*tensors: Tensor):
        given = dict(zip(names, tensors[case.n :], strict=True))
        features = (tensors[: case.n],)
        return torch.func.functional_call(layer, given, features, {"return_cells": True})

    assert torch.autograd.gradcheck(call, (*xs, *params), fast_mode=True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_second_derivatives_are_refused(loss, trainable):
    layer, (xs, _) = layer_of(Case(3)).requires_grad_(trainable), draw(Case(3))
    z, zs = layer(xs, return_cells=True)
    total = {"z": z.sum(), "cells": zs.sum(), "both": z.pow(3).sum() + zs.pow(3).sum()}[loss]
    (grad,) = torch.autograd.grad(total, xs[0], create_graph=True)
    with pytest.raises(DoubleBackwardError):
        grad.square().sum().backward()


@pytest.mark.parametrize("lead", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_writing_into_the_results_is_harmless(tracked, lead):
    case = Case(6, variant="released")
    layer, (xs, g) = layer_of(case), draw(case)
    features = [x.view(*lead, case.dim) for x in xs]
    leaves, g = [*xs, *layer.parameters()], (g[0].view(*lead, -1), g[1:].view(case.n, *lead, -1))
    expected = torch.autograd.grad(layer(features, return_cells=True), leaves, g)
    z, zs, info = layer(features, return_cells=True, return_info=True)
    before = [z.clone(), zs.clone()]
    for t in (z, zs):
        (t if tracked else t.detach()).mul_(2)
    assert_equal([z, zs], [2 * t for t in before])
    given = torch.autograd.grad((z, zs), leaves, g)
    assert_equal(given, [(2 if tracked else 1) * t for t in expected])
    assert info.converged.all()


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
        call = (*call, *code, solver.code, adjoint.code, "cpu", "ignore")
    else:
        g, option = torch.randn_like(states), (*code, adjoint.code, "cpu", full)
        call = (g[0], g[1:] if full else None, states, xs, params, mask, *option)
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
        native.solve_layer(*tensors, *how, *cpu._forward(TIGHT), 0)

    def backward(*tensors) -> None:
        g, more, states, xs, params, mask = tensors
        native.adjoint_layer(
            g, more, states, xs, params, True, mask, *how, *adjoint_numbers(Implicit())
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
    for count in (1, 2, 3):
        threads(count)
        rows, params = answer(layer, xs, g)
        assert all(p.isfinite().all() and p.any() for p in params)
        found.append(rows + params)
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


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
