"""The compiled adjoint against the reference and dense implicit gradients; gradcheck."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import (
    DTYPES,
    FULL,
    ROWS,
    SIZES,
    Case,
    leaves_of,
    named,
)
from torch import Tensor

from deqfuse import (
    Anderson,
    DEQFusion,
    Implicit,
    Neumann,
    OneStep,
    Outcome,
    testing,
)
from deqfuse.backends.maps import VARIANTS

ops = torch.ops.deqfuse

EXACT = {"solver": Anderson(tol=1e-12, max_iter=500)}
IMPLICIT = [Implicit(solver=s, tol=1e-12, max_iter=500) for s in ("auto", "anderson", "neumann")]


def gradients(layer: DEQFusion, xs: list[Tensor], g: Tensor, backend: str) -> dict[str, Tensor]:
    """By name, for whatever requires a gradient; ``g`` is the cotangent of (z, zs)."""
    layer.backend = backend
    z, zs, info = layer(xs, return_cells=True, return_info=True)
    assert info.backend == backend
    leaves = {f"features[{i}]": x for i, x in enumerate(xs)} | dict(layer.named_parameters())
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad((z, zs), list(leaves.values()), (g[0], g[1:]))
    return dict(zip(leaves, grads, strict=True))


def assert_gradients_agree(given: dict, expected: dict, limit: float) -> None:
    """Relative to the largest entry of each, or of 1e-4 of the largest of all."""
    floor = 1e-4 * max(float(e.abs().max()) for e in expected.values() if e.numel())
    for name, wanted in expected.items():
        assert (given[name].shape, given[name].dtype) == (wanted.shape, wanted.dtype), name
        if wanted.numel():
            error = (given[name] - wanted).abs().max() / max(wanted.abs().max(), floor)
            assert error <= limit, (name, float(error))


@pytest.mark.parametrize("adjoint", IMPLICIT, ids=lambda o: o.solver)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_the_dense_implicit_ones(variant, adjoint):
    case = Case(rows=3, variant=variant)
    layer = case.layer(adjoint=adjoint, backend="cpu", **EXACT)
    errors = testing.gradient_errors(layer, [x.float() for x in leaves_of(case)[0]])
    assert len(errors) == 10 * case.n + 6 + 1 + (variant != "paper") + case.n
    assert max(errors.values()) <= 1e-8


@pytest.mark.parametrize(("dim", "groups"), [(4, 1), (20, 5), (50, 2)])
def test_gradients_are_the_dense_ones_for_odd_sizes(dim, groups):
    case = Case(rows=2, dim=dim, groups=groups, n=3)
    layer = case.layer(adjoint=IMPLICIT[0], backend="cpu", **EXACT)
    errors = testing.gradient_errors(layer, [x.float() for x in leaves_of(case)[0]])
    assert max(errors.values()) <= 1e-8


@pytest.mark.parametrize("adjoint", [*IMPLICIT, OneStep(), Neumann(k=1), Neumann(k=4)], ids=repr)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_agree(variant, adjoint):
    case = Case(rows=37, variant=variant)
    layer, (xs, g) = case.layer(adjoint=adjoint, **EXACT), leaves_of(case)
    expected = gradients(layer, xs, g, "reference")
    assert_gradients_agree(gradients(layer, xs, g, "cpu"), expected, 1e-9)


GRADIENT_GRID = [
    *(Case(rows=r) for r in ROWS),
    *(Case(rows=9, n=n) for n in (1, 3, 6)),
    *(Case(rows=5, dim=d, groups=g) for d, g in SIZES if d < 300),
    Case(rows=20, dim=300, groups=4),
    Case(rows=3, dim=500, groups=4, variant="released-mmimdb"),
    Case(rows=300, dim=20, groups=5),
]


@pytest.mark.parametrize("case", **named(GRADIENT_GRID))
def test_gradients_agree_for_every_shape(case):
    layer, (xs, g) = case.layer(adjoint=IMPLICIT[0], **EXACT), leaves_of(case)
    if case.rows == 0:
        given = gradients(layer, xs, g, "cpu")
        assert all((grad == 0).all() for grad in given.values())
        return
    expected = gradients(layer, xs, g, "reference")
    assert_gradients_agree(gradients(layer, xs, g, "cpu"), expected, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_agree_on_the_full_grid(variant):
    for case in FULL:
        if (case.variant, case.dtype) != (variant, "f64") or case.dim == 4 or case.rows == 0:
            continue
        layer, (xs, g) = case.layer(adjoint=IMPLICIT[0], **EXACT), leaves_of(case)
        for layer.backend in ("cpu", "reference"):  # without the few rows that do not converge
            g = g * layer(xs, return_info=True)[1].converged[:, None]
        assert (g[0] != 0).any(-1).double().mean() >= 0.75
        expected = gradients(layer, xs, g, "reference")
        assert_gradients_agree(gradients(layer, xs, g, "cpu"), expected, 1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_gradients_agree_in_low_precision(dtype, variant):
    """The error of either is its tolerance plus the rounding of what is stored."""
    case = Case(rows=33, variant=variant, dtype=dtype)
    options = {"solver": Anderson(tol=1e-5), "adjoint": Implicit(tol=1e-5)}
    layer, (xs, g) = case.layer(**options), leaves_of(case)
    expected = gradients(layer, xs, g, "reference")
    limit = 3e-3 if dtype == "f32" else 8 * torch.finfo(DTYPES[dtype]).eps
    assert_gradients_agree(gradients(layer, xs, g, "cpu"), expected, limit)


@pytest.mark.parametrize("rows", [33, 70])
def test_only_what_is_asked_for_is_computed_and_the_same(rows):
    case = Case(rows=rows)
    layer, (xs, g) = case.layer(adjoint=IMPLICIT[0], **EXACT), leaves_of(case)
    everything = gradients(layer, xs, g, "cpu")
    frozen = layer.cells[0].linear1.weight.requires_grad_(False)
    some = gradients(layer, xs, g, "cpu")
    assert len(some) == len(everything) - 1
    layer.requires_grad_(False)
    inputs = gradients(layer, xs, g, "cpu")
    assert len(inputs) == case.n
    layer.requires_grad_()
    frozen.requires_grad_(False)
    parameters = gradients(layer, [x.detach() for x in xs], g, "cpu")
    for subset in (some, inputs, parameters):
        assert all(torch.equal(grad, everything[name]) for name, grad in subset.items())


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("f64", 1e-8), ("f64", 1e-16), ("f64", 1e12), ("f32", 1e-8), ("f32", 1e-12), ("f32", 1e12)],
)
def test_gradients_are_linear_in_the_cotangent(dtype, scale):
    """A loss averaged over millions of entries still gets its gradient to the full tolerance."""
    case = Case(rows=20, dtype=dtype)
    tol = 1e-10 if dtype == "f64" else 1e-5
    options = {"solver": Anderson(tol=tol, max_iter=200), "adjoint": Implicit(tol=tol)}
    layer, (xs, g) = case.layer(**options), leaves_of(case)
    plain = gradients(layer, xs, g, "cpu")
    scaled = gradients(layer, xs, scale * g, "cpu")
    assert_gradients_agree({k: v / scale for k, v in scaled.items()}, plain, 40 * tol)


@pytest.mark.parametrize("operator", ["adjoint_cells", "adjoint_fuse"])
@pytest.mark.parametrize("scale", [1e-16, 1e-8, 1.0, 1e16])
def test_evaluations_do_not_depend_on_the_size_of_the_cotangent(operator, scale):
    g, *rest = arguments(operator, 40, requires_grad=False)
    *_, nfe, _ = getattr(ops, operator)(g, *rest)
    *_, residual, scaled_nfe, outcome = getattr(ops, operator)(scale * g, *rest)
    assert (outcome == Outcome.CONVERGED).all()
    assert (residual <= ADJOINT.tol).all()
    assert (scaled_nfe - nfe).abs().max() <= 1


# ---- the operators -------------------------------------------------------------------------------

SOLVER, ADJOINT = Anderson(tol=1e-10, max_iter=200), Implicit(tol=1e-10, max_iter=200)
OPERATORS = ("solve_cells", "solve_fuse", "adjoint_cells", "adjoint_fuse")


def arguments(operator: str, rows: int = 3, *, requires_grad: bool, dtype: str = "f64") -> tuple:
    """A valid call of an operator, with mask and start given, and everything present."""
    case = Case(rows=rows, dtype=dtype)
    solve = case.blocks(mask=True, start=True)[operator.split("_")[1]]
    given = solve.keywords
    code = (case.groups, case.variant, SOLVER.code, ADJOINT.code, "cpu", "ignore")
    cells = operator.endswith("cells")
    middle = (None,) if cells else (given["mask"], None, case.n)
    tensors = [
        [t.clone().requires_grad_(requires_grad) for t in a]
        if isinstance(a, list)
        else a.clone().requires_grad_(requires_grad)
        for a in solve.args
    ]
    if operator.startswith("solve"):
        optional = (given["z0"], None) if cells else (given["mask"], given["z0"], None, case.n)
        return *tensors, *optional, *code
    with torch.no_grad():
        z = solve(solver=SOLVER, backend="cpu")[0]
    tail = (case.groups, case.variant, ADJOINT.code, "cpu", True)
    return torch.randn_like(z), z, *tensors, *middle, *tail


@pytest.mark.parametrize("rows", [3, 0])
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator, rows):
    call = arguments(operator, rows, requires_grad=operator.startswith("solve") and rows > 0)
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if rows:
        utils.append("test_aot_dispatch_dynamic")
    result = torch.library.opcheck(getattr(ops, operator), call, test_utils=utils)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("operator", ["adjoint_cells", "adjoint_fuse"])
def test_a_zero_cotangent_has_a_zero_gradient(operator):
    g, *rest = arguments(operator, 40, requires_grad=False)
    g[..., 1::2, :] = 0
    dx, *_, residual, _, outcome = getattr(ops, operator)(g, *rest)
    assert (dx[..., 1::2, :] == 0).all()
    assert (dx[..., ::2, :] != 0).any(-1).all()
    assert (outcome == Outcome.CONVERGED).all()
    assert (residual[..., 1::2] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [1, 2])
def test_gradcheck_of_the_layer(variant, rows):
    case = Case(rows=rows, variant=variant)
    layer = case.layer(
        backend="cpu",
        solver=Anderson(tol=1e-13, max_iter=500),
        adjoint=Implicit(tol=1e-13, max_iter=500),
    )
    names, leaves = zip(*layer.named_parameters(), strict=True)

    def call(*tensors: Tensor):
        xs, params = tensors[: case.n], tensors[case.n :]
        return torch.func.functional_call(
            layer, dict(zip(names, params, strict=True)), (xs,), {"return_cells": True}
        )

    inputs = tuple(x.requires_grad_() for x in case.draw(case.n))
    xs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(call, (*xs, *leaves), fast_mode=True)


@pytest.mark.parametrize("operator", ["solve_cells", "solve_fuse"])
def test_gradcheck_of_the_operators(operator):
    call = arguments(operator, 2, requires_grad=True)
    codes = {SOLVER.code: Anderson(tol=1e-13, max_iter=500).code}
    call = [codes.get(a, a) if isinstance(a, str) else a for a in call]
    slots = [i for i, a in enumerate(call) if isinstance(a, list)]
    sizes = [len(call[i]) for i in slots]
    tensors = [a for a in call if isinstance(a, Tensor) and a.requires_grad]

    def run(*leaves: Tensor) -> Tensor:
        free, params, filled = list(leaves[: len(tensors)]), list(leaves[len(tensors) :]), []
        for a in call:
            if isinstance(a, list):
                filled.append(params)
            else:
                filled.append(free.pop(0) if isinstance(a, Tensor) and a.requires_grad else a)
        return getattr(ops, operator)(*filled)[0]

    assert sizes == [20 if operator == "solve_cells" else 6]
    assert torch.autograd.gradcheck(run, (*tensors, *call[slots[0]]), fast_mode=True)
