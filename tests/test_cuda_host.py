"""The CUDA adjoint's kernel bodies, run on the CPU by the host policy, against the CPU backend.

``torch.ops.deqfuse.cuda_adjoint_*`` on CPU tensors run what the CUDA kernels are made of, one lane
after the other: races, barriers and the layout of tensor-core fragments are not tested by this.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from cpu_cases import Case, assert_equal, named
from cuda_cases import A100, CUTS, H100, Problem, device, distance, limit_for
from torch import Tensor

from deqfuse import Implicit, Outcome
from deqfuse.backends import cuda_native, native, reference
from deqfuse.backends.maps import VARIANTS

SMALL = [
    *(Case(rows=rows) for rows in (0, 1, 7, 8, 9, 16, 17, 33)),
    *(Case(rows=17, dim=d, groups=g) for d, g in ((20, 5), (50, 2), (64, 4), (66, 33), (93, 31))),
    *(Case(rows=9, n=n) for n in (1, 3, 17)),
    Case(rows=3, dim=8, groups=1),
]
GRID = [
    Case(rows, dim, groups, n)
    for rows, (dim, groups), n in itertools.product(
        (1, 15, 16, 17, 40), ((4, 2), (12, 4), (20, 5), (96, 4), (128, 4), (250, 2)), (1, 2, 5)
    )
]


def check_against_cpu(case: Case, cut: str, mask: bool) -> None:
    """Both solve to 1e-12; narrow groups stretch what is left by up to 300 (float64)."""
    problem = Problem(case, mask)
    for kind in ("cells", "fuse"):
        expected, before = problem.run(kind, native)
        with device(limit_for(cut, case)):
            given, (residual, nfe, outcome) = problem.run(kind, cuda_native)
        assert residual.shape == before[0].shape
        solved = (before[2] == Outcome.CONVERGED).all() and (outcome == Outcome.CONVERGED).all()
        if not solved:  # a group that is all zero after the relu
            assert case.dim // case.groups <= 2
            continue
        assert (residual <= problem.tol).all()
        assert (nfe >= 1).all()
        assert distance(given, expected) <= (1e-9 if case.dim // case.groups > 2 else 1e-7)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", **named(SMALL))
def test_gradients_are_those_of_the_cpu_backend(case, variant, cut):
    mask = (case.rows + len(variant)) % 2 == 0
    check_against_cpu(dataclasses.replace(case, variant=variant), cut, mask)


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_cpu_backend_on_the_full_grid(variant, cut):
    for case in GRID:
        if cut != "resident" or case.dim <= 96:
            check_against_cpu(dataclasses.replace(case, variant=variant), cut, case.n != 2)


def check_float32(case: Case, limit: int) -> None:
    """Both measured against the float64 gradient at the same (rounded) inputs."""
    problem = Problem(case, mask=True)
    for kind in ("cells", "fuse"):
        truth, _ = problem.run(kind, native, dtype=torch.float64, tol=1e-13)
        ours = distance(problem.run(kind, native)[0], truth)
        with device(limit):
            given, (*_, outcome) = problem.run(kind, cuda_native)
        assert (outcome == Outcome.CONVERGED).all()
        assert distance(given, truth) <= 4 * ours + 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dim", [12, 50])
def test_float32_is_as_exact_as_the_cpu_backend(dim, variant, cut):
    case = Case(rows=33, dim=dim, groups=2, variant=variant, dtype="f32")
    check_float32(case, limit_for(cut, case))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [A100, H100])
@pytest.mark.parametrize("dim", [64, 128, 192, 256, 300])
def test_float32_at_the_sizes_of_use(dim, limit):
    check_float32(Case(rows=33, dim=dim, groups=4, dtype="f32"), limit)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_lanes_and_rows_may_come_in_any_order(kind, cut):
    """Where two of them raced, the orders would differ."""
    case = Case(rows=37, dim=50, variant="released-mmimdb", dtype="f32")
    problem, limit = Problem(case, mask=True), limit_for(cut, case)
    with device(limit):
        forwards, statistics = problem.run(kind, cuda_native)
    with device(limit, reverse=True):
        backwards, others = problem.run(kind, cuda_native)
    assert_equal([*forwards.values(), *statistics], [*backwards.values(), *others])


@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_a_row_does_not_depend_on_its_batch(kind):
    case = Case(rows=21, dim=20, groups=5)
    problem = Problem(case, mask=True)
    together, (residual, nfe, _) = problem.run(kind, cuda_native)
    for row in (0, 15, 20):
        alone = tuple(
            a if isinstance(a, list) else a[..., row : row + 1, :].contiguous()
            for a in getattr(problem, kind)
        )
        given, (own_residual, own_nfe, _) = problem.run(kind, cuda_native, given=alone)
        pairs = [(given["dx"], together["dx"][..., row : row + 1, :])]
        pairs += [(own_residual, residual[..., row : row + 1]), (own_nfe, nfe[..., row : row + 1])]
        for a, b in pairs:
            assert torch.equal(a, b)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_a_poisoned_row_stays_alone(kind, cut):
    case = Case(rows=19)
    problem, limit = Problem(case, mask=True), limit_for(cut, case)
    given = list(getattr(problem, kind))
    with device(limit):
        clean, _ = problem.run(kind, cuda_native)
        for poisoned in (0, 2):  # the cotangent, the injection
            bad = [a if isinstance(a, list) else a.clone() for a in given]
            bad[poisoned][..., 4, 3] = torch.nan
            found, (_, nfe, outcome) = problem.run(kind, cuda_native, given=tuple(bad))
            assert (outcome[..., 4] == Outcome.NON_FINITE).all()
            assert (nfe[..., 4] <= 3).all()
            assert found["dx"][..., 4, :].isnan().any(-1).all()  # behind a relu it may be 0
            others = [i for i in range(case.rows) if i != 4]
            assert torch.equal(found["dx"][..., others, :], clean["dx"][..., others, :])
            assert (outcome[..., others] == Outcome.CONVERGED).all()


@pytest.mark.parametrize("kind", ["cells", "fuse"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("mode", [0, 1, 4])
def test_a_cut_series_is_that_of_the_cpu_backend(mode, cut, kind):
    case = Case(rows=18, variant="released")
    problem, limit = Problem(case, mask=True), limit_for(cut, case)
    how = {"mode": mode, "tol": 0.0, "max_iter": mode, "history": 0}
    expected, (_, nfe, outcome) = problem.run(kind, native, **how)
    with device(limit):
        given, statistics = problem.run(kind, cuda_native, **how)
    assert distance(given, expected) <= 1e-11
    assert statistics[0].isnan().all()
    assert torch.equal(statistics[1], nfe)
    assert torch.equal(statistics[2], outcome)


@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_neumann_to_tolerance(kind):
    problem = Problem(Case(rows=18))
    how = {"tol": 1e-10, "history": 0, "max_iter": 2000}
    expected, _ = problem.run(kind, native, **how)
    given, (residual, _, outcome) = problem.run(kind, cuda_native, **how)
    assert (outcome == Outcome.CONVERGED).all()
    assert (residual <= 1e-10).all()
    assert distance(given, expected) <= 1e-7


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recurrence_is_the_reference_one(variant):
    """As many applications of J^T, row by row, and the same gradients."""
    case = Case(rows=40, dim=20, groups=5, variant=variant)
    problem = Problem(case)
    option = Implicit(solver="bicgstab", tol=1e-8, max_iter=400)
    g, z, x, flat = problem.cells
    tail = (flat, case.groups, variant, option, True)
    dx, grads, wanted = reference.adjoint_cells(g, z, x, *tail)
    given, (_, nfe, _) = problem.run("cells", cuda_native, tol=1e-8)
    expected = {"dx": dx} | {f"params[{i}]": p for i, p in enumerate(grads)}
    assert distance(given, expected) <= 1e-6
    assert (nfe == wanted.nfe).double().mean() >= 0.9


@pytest.mark.parametrize("max_iter", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_a_spent_budget_is_said(kind, max_iter):
    problem = Problem(Case(rows=17))
    given, (residual, nfe, outcome) = problem.run(kind, cuda_native, tol=1e-14, max_iter=max_iter)
    assert (outcome == Outcome.MAX_ITER).all()
    assert (nfe <= max_iter).all()
    assert (nfe >= max_iter - 2).all()
    assert (residual > 1e-14).all()
    assert all(g.isfinite().all() for g in given.values())


@pytest.mark.parametrize("scale", [0.0, 1e-200, 1e200])
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_the_size_of_the_cotangent_does_not_matter(kind, scale):
    problem = Problem(Case(rows=17))
    plain, (_, nfe, _) = problem.run(kind, cuda_native)
    g, *rest = getattr(problem, kind)
    given, (residual, scaled, outcome) = problem.run(kind, cuda_native, given=(scale * g, *rest))
    assert (outcome == Outcome.CONVERGED).all()
    if scale == 0:
        assert (given["dx"] == 0).all()
        assert (scaled == 0).all()
        assert (residual == 0).all()
        return
    assert (scaled - nfe).abs().max() <= 2
    assert distance({"dx": given["dx"] / scale}, {"dx": plain["dx"]}) <= 1e-9


def test_one_cotangent_may_serve_all_modalities():
    case = Case(rows=17, n=3)
    problem = Problem(case)
    g, *rest = problem.cells
    shared = g[:1].expand_as(g)
    given, _ = problem.run("cells", cuda_native, given=(shared, *rest))
    expected, _ = problem.run("cells", cuda_native, given=(shared.contiguous(), *rest))
    assert_equal(list(given.values()), list(expected.values()))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_only_what_is_asked_for(kind, cut):
    case = Case(rows=17)
    problem = Problem(case, mask=True)
    with device(limit_for(cut, case)):
        everything, _ = problem.run(kind, cuda_native)
        inputs, _ = problem.run(kind, cuda_native, want=False)
    assert {"dx"} <= inputs.keys() <= {"dx", "dcell_sum"}
    assert all(torch.equal(grad, everything[name]) for name, grad in inputs.items())


def ten_bits(t: Tensor) -> Tensor:
    """As the tensor cores round their operands."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_tf32_reaches_its_tolerance_and_float64_ignores_it():
    """Its error is that of rounded weights and equilibria: a relu's sign may flip."""
    problem = Problem(Case(rows=33, dim=64, groups=4, dtype="f32"))
    for kind in ("cells", "fuse"):
        exact, _ = problem.run(kind, cuda_native)
        given, (residual, _, outcome) = problem.run(kind, cuda_native, tol=1e-3, allow_tf32=True)
        assert (outcome == Outcome.CONVERGED).all()
        assert (residual <= 1e-3).all()
        g, z, *rest = getattr(problem, kind)
        coarse = [
            [ten_bits(t) if t.dim() == 2 else t for t in a] if isinstance(a, list) else a
            for a in rest
        ]
        rounded, _ = problem.run(kind, native, given=(g, ten_bits(z), *coarse))
        for name, wanted in exact.items():
            error = (given[name] - wanted).norm() / wanted.norm()
            assert error > 1e-5, name
            assert error <= 4 * (rounded[name] - wanted).norm() / wanted.norm() + 4e-3, name
    problem = Problem(Case())
    plain, _ = problem.run("cells", cuda_native)
    allowed, _ = problem.run("cells", cuda_native, allow_tf32=True)
    assert torch.equal(plain["dx"], allowed["dx"])


class _Solved(torch.autograd.Function):
    """The compiled forward with the CUDA adjoint."""

    @staticmethod
    def forward(ctx, kind: str, case: Case, count: int, *tensors: Tensor) -> Tensor:
        ctx.kind, ctx.case, ctx.count = kind, case, count
        leaves, params = tensors[:count], list(tensors[count:])
        how = (1e-13, 500, 5, 1.0, 1e-6, 0)
        skip, last = case.variant != "paper", case.variant == "released-mmimdb"
        if kind == "cells":
            z = native.solve_cells(leaves[0], params, None, case.groups, skip, *how)[0]
        else:
            z = native.solve_fuse(*leaves, params, None, None, case.n, case.groups, last, *how)[0]
        ctx.save_for_backward(z, *tensors)
        return z

    @staticmethod
    def backward(ctx, g: Tensor):
        z, *tensors = ctx.saved_tensors
        leaves, params = tensors[: ctx.count], tensors[ctx.count :]
        g, case, how = g.contiguous(), ctx.case, (-1, 1e-13, 500, 6, 1.0, 1e-6)
        skip, last = case.variant != "paper", case.variant == "released-mmimdb"
        if ctx.kind == "cells":
            dx, grads, *_ = cuda_native.adjoint_cells(
                g, z, *leaves, params, True, case.groups, skip, *how
            )
            return None, None, None, dx, *grads
        dx, dsum, grads, *_ = cuda_native.adjoint_fuse(
            g, z, *leaves, params, True, None, case.n, case.groups, last, *how
        )
        return None, None, None, dx, dsum, *grads


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_gradcheck(kind, variant, cut):
    case = Case(rows=2, variant=variant)
    problem = Problem(case)
    _, _, *leaves = getattr(problem, kind)
    inputs, params = leaves[: 1 if kind == "cells" else 2], leaves[1 if kind == "cells" else 2]
    tensors = [t.detach().clone().requires_grad_() for t in (*inputs, *params)]
    with device(limit_for(cut, case)):
        assert torch.autograd.gradcheck(
            lambda *t: _Solved.apply(kind, case, len(inputs), *t), tensors, fast_mode=True
        )


@pytest.mark.parametrize("rows", [3, 0])
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_opcheck(kind, rows):
    problem = Problem(Case(rows=rows), mask=True)
    given, tail = getattr(problem, kind), (-1, 1e-8, 100, 6, 1.0, 1e-6)
    if kind == "cells":
        call = (*given, True, 2, False, *tail)
    else:
        call = (*given[:-1], True, given[-1], 2, 2, False, *tail)
    utils = ["test_schema", "test_faketensor"]
    result = torch.library.opcheck(
        getattr(cuda_native, f"adjoint_{kind}"), call, {"allow_tf32": True}, test_utils=utils
    )
    assert set(result.values()) == {"SUCCESS"}


def test_what_the_kernels_cannot_read_is_refused():
    problem = Problem(Case())
    g, z, x, flat = problem.cells
    for bad, message in [
        ((g[:, :5], z, x, flat), "grad_z"),
        ((g, z, x.float(), flat), "x"),
        ((g, z, x, flat[:-1]), "params"),
        ((g, z.half(), x, flat), "float32 or float64"),
        ((g, z.mT.contiguous().mT, x, flat), "z: expected 408 contiguous values"),
    ]:
        for backend in (cuda_native, native):
            with pytest.raises(RuntimeError, match=message):
                problem.run("cells", backend, given=bad)
    g, z, *rest = problem.fuse
    for backend in (cuda_native, native):
        with pytest.raises(RuntimeError, match="z: expected 204 contiguous values"):
            problem.run("fuse", backend, given=(g, z.mT.contiguous().mT, *rest))
    layer = [*flat, *problem.fuse[4], torch.ones(2, dtype=z.dtype)]
    states = torch.cat([problem.cells[1], z[None]])
    how = (2, False, False, -1, 1e-9, 100, 6, 1.0, 1e-6)
    with pytest.raises(RuntimeError, match="states: expected 612 contiguous values"):
        native.adjoint_layer(g, None, states.mT.contiguous().mT, list(x), layer, True, None, *how)


@pytest.mark.parametrize(
    ("dim", "size", "limit", "cut", "rows"),
    [
        (64, 4, H100, "resident", 16),
        (128, 4, H100, "resident", 16),
        (128, 4, A100, "streamed", 16),
        (256, 4, H100, "streamed", 16),
        (256, 4, A100, "streamed", 8),
        (300, 4, H100, "steps", 16),
        (64, 8, H100, "resident", 8),
        (128, 8, H100, "streamed", 8),
        (256, 8, H100, "streamed", 8),
        (256, 8, A100, "steps", 16),
    ],
)
def test_how_problems_are_cut(dim, size, limit, cut, rows):
    with device(limit):
        plan = native.module.host_plan(dim, 4, size)
    assert (plan["cut"], plan["rows"]) == (cut, rows)
    assert plan["bytes"] <= limit or cut == "steps"


# ---- the library of CUDA kernels -----------------------------------------------------------------


def test_a_library_that_cannot_be_had_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def error() -> str:
        cuda_native.load_error.cache_clear()
        return cuda_native.load_error()

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in error()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    library = tmp_path / "_cuda.so"
    monkeypatch.setattr(cuda_native, "_LIBRARY", library)
    assert "was not built" in error()
    library.write_text("not a library")
    assert "_cuda.so does not load" in error()
    assert "too short" in error() or "invalid" in error()
    cuda_native.load_error.cache_clear()


@pytest.mark.parametrize(
    ("driver", "runtime", "reason"),
    [
        (13000, 13000, None),
        (12080, 12090, None),  # an older driver of the same major version runs compiled kernels
        (13010, 12060, None),
        (12080, 13000, "built with CUDA 13.0 and the NVIDIA driver knows CUDA 12.8"),
        (0, 13000, "built with CUDA 13.0 and there is no NVIDIA driver"),
    ],
)
def test_a_driver_that_cannot_run_the_library_is_a_reason(driver, runtime, reason):
    class Library:
        @staticmethod
        def deqfuse_cuda_versions(first, second):
            first._obj.value, second._obj.value = driver, runtime

    said = cuda_native._driver_error(*cuda_native.versions(Library()))
    assert said is None if reason is None else reason in said
