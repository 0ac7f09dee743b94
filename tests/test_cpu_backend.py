"""The compiled backend against the reference: values, statistics, every gradient, refusals."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deqfuse import (
    Anderson,
    BackendUnavailable,
    Broyden,
    DEQFusion,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Outcome,
    Picard,
    Unrolled,
    functional,
    ops,
    testing,
)
from deqfuse.backends import cpu, native
from deqfuse.backends.maps import VARIANTS
from deqfuse.backends.reference import compute_dtype

if (missing := cpu.unavailable()) is not None:
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"CI must test the compiled backend: {missing[0]}", pytrace=False)
    pytest.skip(missing[0], allow_module_level=True)

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
ROWS = (0, 1, 15, 16, 17, 33, 65, 130)
SIZES = ((4, 2), (12, 4), (20, 5), (50, 2), (300, 4), (500, 4))  # (d, groups)
TIGHT, LOOSE = Anderson(tol=1e-11, max_iter=200), Anderson(tol=1e-5)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEQFUSE_BACKEND", raising=False)


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int = 17
    dim: int = 12
    groups: int = 2
    n: int = 2
    variant: str = "paper"
    dtype: str = "f64"
    init: str = "contractive"

    def layer(self, **options) -> DEQFusion:
        """Every parameter is away from its initial zeros and ones."""
        torch.manual_seed(1000 * self.dim + self.n)
        given = {"num_groups": self.groups, "variant": self.variant, "init": self.init}
        layer = DEQFusion(self.dim, self.n, on_failure="ignore", **{**given, **options})
        with torch.no_grad():
            for part in layer.modules():
                if isinstance(part, torch.nn.GroupNorm):
                    part.weight.uniform_(0.6, 1.4)
                    part.bias.uniform_(-0.3, 0.3)
            if self.variant != "paper":
                for cell in layer.cells:
                    cell.norm3.weight.mul_(0.1)
        return layer.to(DTYPES[self.dtype])

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.rows, self.dim, dtype=torch.float64).to(DTYPES[self.dtype])

    def blocks(self, mask: bool = False, start: bool = False) -> dict:
        """Both solves, as functions of the solver and the backend."""
        layer = self.layer().requires_grad_(False)
        x, cell_sum = self.draw(self.n), self.n**0.5 * self.draw()
        common = {"num_groups": self.groups, "variant": self.variant, "on_failure": "ignore"}
        drop = 2.0 * (self.draw() > 0).to(x.dtype) if mask else None
        z0 = self.draw(self.n) if start else None
        return {
            "cells": functools.partial(
                functional.solve_cells, x, flat_cells(layer), z0=z0, **common
            ),
            "fuse": functools.partial(
                functional.solve_fuse,
                x.sum(0),
                cell_sum,
                layer.combine.flat(),
                num_modalities=self.n,
                mask=drop,
                z0=None if z0 is None else z0[0],
                **common,
            ),
        }


def flat_cells(layer: DEQFusion) -> list[Tensor]:
    return [t for cell in layer.cells for t in cell.flat()]


def named(cases) -> dict:
    """Parametrisation with the fields that differ from the default as the id."""
    cases, default = list(cases), Case()

    def label(case: Case) -> str:
        fields = dataclasses.asdict(case).items()
        changed = [f"{k}={v}" for k, v in fields if v != getattr(default, k)]
        return ",".join(changed) or "default"

    return {"argvalues": cases, "ids": [label(case) for case in cases]}


def assert_same_solution(solve, solver, steps: int = 1, share: float = 1.0) -> None:
    """Each answer lies within a few of its own residuals of the equilibrium.

    ``|z_a - z_b| <= L / (1 - L) (r_a + r_b) |z|``; the contraction factors L met here are below
    0.8. ``steps`` is by how many evaluations rounding may move the end of a row, ``share`` how many
    of the rows must agree: in float32 rounding decides what becomes of a very slow one.
    """
    z, info, name = solve(solver=solver, backend="cpu")
    expected, reference, _ = solve(solver=solver, backend="reference")
    assert name == "cpu"
    assert (z.shape, z.dtype) == (expected.shape, expected.dtype)
    for field in ("residual", "nfe", "outcome"):
        given, wanted = getattr(info, field), getattr(reference, field)
        assert (given.shape, given.dtype) == (wanted.shape, wanted.dtype), field
    both = (reference.outcome == Outcome.CONVERGED) & (info.outcome == Outcome.CONVERGED)
    # Narrow groups can be all zero after the relu: a few rows of small problems do not converge.
    assert both.sum() >= 0.9 * both.numel()
    assert (info.residual <= solver.tol)[both].all()
    same_end = (info.nfe - reference.nfe).abs() <= steps
    assert (same_end & both).sum() >= share * both.sum()
    limit = 4 * (info.residual + reference.residual) + 64 * torch.finfo(z.dtype).eps
    near = (z - expected).norm(dim=-1) <= limit * expected.norm(dim=-1)
    assert (near & both).sum() >= share * both.sum()


# ---- forward -------------------------------------------------------------------------------------

GRID = [
    *(Case(variant=v, dtype=t) for v, t in itertools.product(VARIANTS, DTYPES)),
    *(Case(rows=r, dtype=t) for r, t in itertools.product(ROWS, ("f64", "f32")) if r != 17),
    *(Case(rows=5, dim=d, groups=g, dtype=t) for (d, g), t in itertools.product(SIZES, DTYPES)),
    *(Case(rows=9, n=n, variant=v) for n in (1, 3, 4, 5, 6) for v in ("paper", "released")),
]
FULL = [
    Case(rows, dim, groups, n, variant, dtype)
    for rows, (dim, groups), n, variant, dtype in itertools.product(
        ROWS, SIZES, range(1, 7), VARIANTS, DTYPES
    )
    if rows * dim <= 8500 or n == 2  # the widest problems with every N would add nothing
]


@pytest.mark.parametrize("case", **named(GRID))
def test_solves_agree(case):
    for solve in case.blocks().values():
        assert_same_solution(solve, TIGHT if case.dtype == "f64" else LOOSE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_solves_agree_on_the_full_grid(dtype):
    for case in FULL:
        if case.dtype == dtype and case.dim >= 12:  # groups of two features have several solutions
            for solve in case.blocks(mask=case.n == 2).values():
                if dtype == "f64":
                    assert_same_solution(solve, TIGHT, steps=2)
                else:
                    assert_same_solution(solve, LOOSE, steps=2, share=0.98)


OPTIONS = [
    *(Anderson(m=m, tol=1e-10, max_iter=300) for m in range(1, 9)),
    *(Anderson(beta=beta, tol=1e-10, max_iter=300) for beta in (0.6, 1.2)),
    Anderson(lam=0, tol=1e-10),
    Anderson(lam=1e-3, tol=1e-10, max_iter=200),
    Picard(tol=1e-10, max_iter=300),
    Picard(beta=0.5, tol=1e-10, max_iter=300),
]


@pytest.mark.parametrize("start", [False, True], ids=["zero", "warm"])
@pytest.mark.parametrize("solver", OPTIONS, ids=repr)
def test_solvers_agree(solver, start):
    for solve in Case(rows=37).blocks(start=start).values():
        assert_same_solution(solve, solver)


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("start", [False, True], ids=["zero", "warm"])
def test_masks_and_starts_agree(variant, dtype, start):
    case = Case(rows=33, variant=variant, dtype=dtype)
    for solve in case.blocks(mask=True, start=start).values():
        assert_same_solution(solve, TIGHT if dtype == "f64" else LOOSE)


@pytest.mark.parametrize(
    "solver",
    [
        *(Anderson(m=m, max_iter=25) for m in (1, 2, 5, 8)),
        Anderson(max_iter=1),
        Anderson(beta=0.7, max_iter=25),
        Picard(max_iter=60),
        Picard(beta=0.5, max_iter=25),
    ],
    ids=repr,
)
@pytest.mark.parametrize("start", [False, True], ids=["zero", "warm"])
def test_statistics_and_traces_are_those_of_the_reference(solver, start):
    """At torch's init rows end in every way: what is counted and recorded is the same."""
    case, solver = Case(rows=70, dim=20, init="torch"), dataclasses.replace(solver, trace=True)
    seen = set()
    for solve in case.blocks(start=start).values():
        z, info, _ = solve(solver=solver, backend="cpu")
        expected, reference, _ = solve(solver=solver, backend="reference")
        # Rows that do not converge amplify rounding; over 25 steps 1e-16 stays below 1e-6.
        steady = torch.isclose(info.residual, reference.residual, rtol=1e-6, atol=0)
        assert steady.double().mean() >= 0.5
        torch.testing.assert_close(z[steady], expected[steady], rtol=1e-5, atol=1e-6)
        assert torch.equal(info.nfe[steady], reference.nfe[steady])
        assert torch.equal(info.outcome[steady], reference.outcome[steady])
        assert info.trace.shape == reference.trace.shape == (solver.max_iter, *info.nfe.shape)
        torch.testing.assert_close(
            info.trace[:, steady], reference.trace[:, steady], rtol=1e-4, atol=1e-9, equal_nan=True
        )
        assert torch.equal(info.trace.isfinite().sum(0), info.nfe)
        seen |= set(info.outcome.flatten().tolist())
    assert Outcome.MAX_ITER in seen


def test_a_row_that_finds_nothing_better_has_stalled():
    solver = Picard(max_iter=200)
    infos = [
        Case(rows=40, init="torch").blocks()["fuse"](solver=solver, backend=name)[1]
        for name in ("cpu", "reference")
    ]
    stalled = infos[1].outcome == Outcome.STALLED
    assert stalled.any()
    assert torch.equal(infos[0].outcome == Outcome.STALLED, stalled)


def test_the_answer_is_the_image_of_the_best_iterate():
    """Also where the best is older than the history: its residual is the smallest of the trace."""
    solver = Anderson(m=2, max_iter=45, trace=True)
    for solve in Case(rows=70, dim=20, init="torch").blocks().values():
        z, info, _ = solve(solver=solver, backend="cpu")
        trace = info.trace.nan_to_num(torch.inf)
        assert torch.equal(info.residual, trace.amin(0))
        best_at, rows = trace.argmin(0) + 1, info.outcome != Outcome.CONVERGED
        assert (info.nfe - best_at)[rows].max() > solver.m
        for count in best_at[rows].unique().tolist()[:5]:
            short = dataclasses.replace(solver, max_iter=count)
            there = rows & (best_at == count)
            assert torch.equal(solve(solver=short, backend="cpu")[0][there], z[there])


@pytest.mark.parametrize("start", [False, True], ids=["zero", "warm"])
def test_rescue_takes_over_what_is_left(start):
    """The compiled solve leaves rows to the same Newton-Krylov steps as the reference does."""
    plain, rescue = Anderson(max_iter=10, tol=1e-8), Anderson(max_iter=10, tol=1e-8, rescue=True)
    for solve in Case(rows=40, init="torch").blocks(start=start).values():
        _, before, _ = solve(solver=plain, backend="cpu")
        z, info, _ = solve(solver=dataclasses.replace(rescue, trace=True), backend="cpu")
        expected, reference, _ = solve(solver=rescue, backend="reference")
        assert (before.outcome != Outcome.CONVERGED).sum() > (info.outcome != 0).sum()
        agree = (info.outcome == 0) & (reference.outcome == 0)
        assert agree.double().mean() > 0.8
        near = (z - expected).norm(dim=-1) <= 1e-5 * expected.norm(dim=-1)
        assert near[agree].double().mean() > 0.95, "other equilibria are rare"
        assert (info.nfe >= before.nfe).all()
        assert info.trace.shape[0] == dataclasses.replace(rescue, trace=True).trace_length


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
def test_strides_do_not_matter(dtype):
    case = Case(rows=17, dtype=dtype)
    for solve in case.blocks(mask=True, start=True).values():
        plain = solve(backend="cpu")

        def strange(t):
            if isinstance(t, list):
                return [strange(p) for p in t]
            if not isinstance(t, Tensor) or t.dim() < 2:
                return t[::1] if isinstance(t, Tensor) else t
            return torch.stack([t.mT, t.mT], dim=-1)[..., 1].mT  # transposed, every second element

        keywords = {k: strange(v) for k, v in solve.keywords.items()}
        other = functools.partial(solve.func, *map(strange, solve.args), **keywords)(backend="cpu")
        assert torch.equal(other[0], plain[0])
        assert torch.equal(other[1].nfe, plain[1].nfe)


def test_expanded_inputs_and_parameters():
    layer = Case().layer().requires_grad_(False)
    one, params = torch.randn(12, dtype=torch.float64), flat_cells(layer)
    params[1] = params[1][:1].expand(12)  # a bias that is one number
    solve = functools.partial(functional.solve_cells, num_groups=2, backend="cpu")
    given, _, _ = solve(one.expand(2, 9, 12), params)
    expected, _, _ = solve(one.repeat(2, 9, 1), [p.contiguous() for p in params])
    assert torch.equal(given, expected)


@pytest.mark.parametrize("rows", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_nan_beyond_float32s_reach(rows):
    """tol 1e-6 asks for the last digits of float32: Gram matrices become singular."""
    torch.manual_seed(3)
    layer = DEQFusion(
        16, 2, variant="released", solver=Anderson(tol=1e-6), on_failure="ignore", backend="cpu"
    )
    xs = [torch.randn(rows, 16, requires_grad=True) for _ in range(2)]
    z, zs, info = layer(xs, return_cells=True, return_info=True)
    assert z.isfinite().all()
    assert zs.isfinite().all()
    assert not (info.cells.outcome == Outcome.NON_FINITE).any()
    z.backward(torch.randn_like(z))
    assert all(x.grad.isfinite().all() for x in xs)
    assert all(p.grad.isfinite().all() for p in layer.parameters())


# ---- adjoint -------------------------------------------------------------------------------------

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


def leaves_of(case: Case) -> tuple[list[Tensor], Tensor]:
    xs = [case.draw().requires_grad_() for _ in range(case.n)]
    return xs, case.draw(case.n + 1)


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
    """A valid call of an operator, with every optional tensor given."""
    case = Case(rows=rows, dtype=dtype)
    solve = case.blocks(mask=True, start=True)[operator.split("_")[1]]
    given = solve.keywords
    code = (case.groups, case.variant, SOLVER.code, ADJOINT.code, "cpu", "ignore")
    middle = () if operator.endswith("cells") else (given["mask"], case.n)
    tensors = [
        [t.clone().requires_grad_(requires_grad) for t in a]
        if isinstance(a, list)
        else a.clone().requires_grad_(requires_grad)
        for a in solve.args
    ]
    if operator.startswith("solve"):
        optional = (given["mask"], given["z0"], case.n) if middle else (given["z0"],)
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


# ---- instruction sets ----------------------------------------------------------------------------

PROGRAM = """
import json, sys, torch
from deqfuse import DEQFusion
from deqfuse.backends import native
torch.set_num_threads(1)
layer, xs, g = torch.load(sys.argv[1], weights_only=False)
z = layer(xs)
grads = torch.autograd.grad(z, [*xs, *layer.parameters()], g)
torch.save([z.detach(), *grads], sys.argv[2])
print(json.dumps(native.module.build_info()))
"""


@pytest.mark.parametrize("name", ["base", "avx2", "avx512"])
def test_instruction_sets_agree(name, tmp_path: Path):
    problems, answers = [], []
    for dtype, tol in (("f64", 1e-12), ("f32", 1e-5)):
        case = Case(rows=37, dim=20, dtype=dtype)
        options = {"solver": Anderson(tol=tol, max_iter=200), "adjoint": Implicit(tol=tol)}
        layer, (xs, g) = case.layer(backend="cpu", **options), leaves_of(case)
        z = layer(xs)
        answers.append([z, *torch.autograd.grad(z, [*xs, *layer.parameters()], g[0])])
        problems.append((layer, xs, g[0]))
    for i, (problem, expected) in enumerate(zip(problems, answers, strict=True)):
        torch.save(problem, tmp_path / f"problem{i}")
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, tmp_path / f"problem{i}", tmp_path / f"answer{i}"],
            env={**os.environ, "DEQFUSE_ISA": name},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        used = json.loads(run.stdout)["instruction_set"]
        if used != name:
            pytest.skip(f"DEQFUSE_ISA={name}: this processor gets {used}")
        limit = 1e-9 if expected[0].dtype == torch.float64 else 1e-3
        for given, wanted in zip(torch.load(tmp_path / f"answer{i}"), expected, strict=True):
            assert (given - wanted).abs().max() <= limit * max(wanted.abs().max(), 1e-2)


def test_build_info_and_plan():
    info = native.module.build_info()
    assert set(info) == {"compiler", "torch_target", "instruction_set", "vector_bytes"}
    widths = {"base": 16, "avx2": 32, "avx512": 64}
    assert info["vector_bytes"] == widths[info["instruction_set"]]
    for rows, dim, itemsize in itertools.product((0, 1, 63, 64, 1000), (12, 500), (4, 8)):
        plan = native.module.plan(rows, dim, itemsize, 5)
        assert set(plan) == {"rows_per_tile", "tiles", "tile_bytes"}
        assert plan["rows_per_tile"] % (info["vector_bytes"] // itemsize) == 0
        assert (plan["tiles"] - 1) * plan["rows_per_tile"] < max(rows, 1)
        assert plan["tiles"] * plan["rows_per_tile"] >= rows
        assert plan["tile_bytes"] > 2 * 5 * dim * plan["rows_per_tile"] * itemsize


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"solver": Broyden()}, "not Broyden"),
        ({"solver": NewtonKrylov()}, "not NewtonKrylov"),
        ({"solver": Anderson(m=9)}, r"not Anderson\(m=9\)"),
        ({"adjoint": Implicit(solver="gmres")}, "not 'gmres'"),
        ({"adjoint": Implicit(solver="dense")}, "not 'dense'"),
        ({"adjoint": Unrolled()}, "as Unrolled asks"),
    ],
    ids=repr,
)
def test_what_it_cannot_do_is_refused_by_name_and_done_by_the_reference(options, reason):
    case = Case(rows=3, dtype="f32")
    xs = list(case.draw(case.n))
    with pytest.raises(BackendUnavailable, match=f"backend='cpu' cannot take this call.*{reason}"):
        case.layer(backend="cpu", **options)(xs)
    _, info = case.layer(**options)(xs, return_info=True)
    assert info.backend == "reference"


def test_other_devices_are_refused():
    case = Case(rows=3)
    layer = case.layer(backend="cpu").to("meta")
    with pytest.raises(BackendUnavailable, match="it runs on CPU tensors, not on meta"):
        layer([x.to("meta") for x in case.draw(case.n)])


def test_auto_takes_it():
    _, info = Case(dtype="f32").layer()(list(Case(dtype="f32").draw(2)), return_info=True)
    assert info.backend == "cpu"


def test_a_missing_module_says_why_and_the_reference_steps_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "load_error", "undefined symbol: of_doom")
    reason, remedy = cpu.unavailable()
    assert "undefined symbol: of_doom" in reason
    assert "--no-build-isolation" in remedy
    assert "DEQFUSE_BUILD=cpu" in remedy
    case = Case(dtype="f32")
    with pytest.raises(BackendUnavailable, match="of_doom"):
        case.layer(backend="cpu")(list(case.draw(2)))
    _, info = case.layer()(list(case.draw(2)), return_info=True)
    assert info.backend == "reference"


def test_answers_come_in_the_compute_dtype():
    for dtype in DTYPES:
        z = Case(rows=3, dtype=dtype).blocks()["cells"](backend="cpu")[0]
        assert z.dtype == compute_dtype(DTYPES[dtype])
