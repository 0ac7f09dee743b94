"""What the CUDA adjoint promises, on the host policy and, the same tests, on a GPU."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import Case, assert_equal
from cuda_cases import (
    CUTS,
    Problem,
    distance,
    every_machine,  # noqa: F401 - a fixture
    own_and_common_numbers,
)
from torch import Tensor

from deqfuse import Implicit, Outcome
from deqfuse.backends import cpu_native, cuda_native, reference
from deqfuse.backends.maps import VARIANTS


@pytest.mark.parametrize("kind", ["cells", "fuse"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_row_does_not_depend_on_its_batch(machine, cut, kind):
    case = machine.case(cut, Case(rows=21, dim=20, groups=5))
    problem = Problem(case, mask=True)
    with machine.playing(cut, case):
        together, (residual, nfe, _) = machine.run(problem, kind)
    for row in (0, 15, 20):
        alone = tuple(
            a if isinstance(a, list) else a[..., row : row + 1, :].contiguous()
            for a in getattr(problem, kind)
        )
        with machine.playing(cut, case):
            given, (own_residual, own_nfe, _) = machine.run(problem, kind, given=alone)
        pairs = [(given["dx"], together["dx"][..., row : row + 1, :])]
        pairs += [(own_residual, residual[..., row : row + 1]), (own_nfe, nfe[..., row : row + 1])]
        for a, b in pairs:
            assert torch.equal(a, b)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_a_poisoned_row_stays_alone(machine, kind, cut):
    case = machine.case(cut, Case(rows=19))
    problem = Problem(case, mask=True)
    given = list(getattr(problem, kind))
    with machine.playing(cut, case):
        clean, _ = machine.run(problem, kind)
        for poisoned in (0, 2):  # the cotangent, the injection
            bad = [a if isinstance(a, list) else a.clone() for a in given]
            bad[poisoned][..., 4, 3] = torch.nan
            found, (_, nfe, outcome) = machine.run(problem, kind, given=tuple(bad))
            assert (outcome[..., 4] == Outcome.NON_FINITE).all()
            assert (nfe[..., 4] <= 3).all()
            assert found["dx"][..., 4, :].isnan().any(-1).all()  # behind a relu it may be 0
            others = [i for i in range(case.rows) if i != 4]
            assert torch.equal(found["dx"][..., others, :], clean["dx"][..., others, :])
            assert (outcome[..., others] == Outcome.CONVERGED).all()


@pytest.mark.parametrize("kind", ["cells", "fuse"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("mode", [0, 1, 4])
def test_a_cut_series_is_that_of_the_cpu_backend(machine, mode, cut, kind):
    case = machine.case(cut, Case(rows=18, variant="released"))
    problem = Problem(case, mask=True)
    how = {"mode": mode, "tol": 0.0, "max_iter": mode, "history": 0}
    expected, (_, nfe, outcome) = problem.run(kind, cpu_native, **how)
    with machine.playing(cut, case):
        given, statistics = machine.run(problem, kind, **how)
    assert distance(given, expected) <= 1e-11
    assert statistics[0].isnan().all()
    assert torch.equal(statistics[1], nfe)
    assert torch.equal(statistics[2], outcome)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cut", CUTS)
def test_rows_may_have_numbers_of_modalities_of_their_own(machine, cut, variant):
    """What rows with the same number get without such numbers, and the parameters their sums."""
    case = machine.case(cut, Case(rows=18, variant=variant))
    with machine.playing(cut, case):
        given, expected = own_and_common_numbers(case, cuda_native, machine.place)
    assert distance(given, expected) <= 1e-11


@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_neumann_to_tolerance(machine, kind):
    problem = Problem(Case(rows=18))
    how = {"tol": 1e-10, "history": 0, "max_iter": 2000}
    expected, _ = problem.run(kind, cpu_native, **how)
    given, (residual, _, outcome) = machine.run(problem, kind, **how)
    assert (outcome == Outcome.CONVERGED).all()
    assert (residual <= 1e-10).all()
    assert distance(given, expected) <= 1e-7


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recurrence_is_the_reference_one(machine, variant):
    """As many applications of J^T, row by row, and the same gradients."""
    case = Case(rows=40, dim=20, groups=5, variant=variant)
    problem = Problem(case)
    option = Implicit(solver="bicgstab", tol=1e-8, max_iter=400)
    g, z, x, flat = problem.cells
    tail = (flat, case.groups, VARIANTS[variant], option, True)
    dx, grads, wanted = reference.adjoint_cells(g, z, x, *tail)
    given, (_, nfe, _) = machine.run(problem, "cells", tol=1e-8)
    expected = {"dx": dx} | {f"params[{i}]": p for i, p in enumerate(grads)}
    assert distance(given, expected) <= 1e-6
    assert (nfe == wanted.nfe).double().mean() >= 0.9


@pytest.mark.parametrize("max_iter", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_a_spent_budget_is_said(machine, kind, max_iter):
    problem = Problem(Case(rows=17))
    given, (residual, nfe, outcome) = machine.run(problem, kind, tol=1e-14, max_iter=max_iter)
    assert (outcome == Outcome.MAX_ITER).all()
    assert (nfe <= max_iter).all()
    assert (nfe >= max_iter - 2).all()
    assert (residual > 1e-14).all()
    assert all(g.isfinite().all() for g in given.values())


@pytest.mark.parametrize("scale", [0.0, 1e-200, 1e200])
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_the_size_of_the_cotangent_does_not_matter(machine, kind, scale):
    problem = Problem(Case(rows=17))
    plain, (_, nfe, _) = machine.run(problem, kind)
    g, *rest = getattr(problem, kind)
    given, (residual, scaled, outcome) = machine.run(problem, kind, given=(scale * g, *rest))
    assert (outcome == Outcome.CONVERGED).all()
    if scale == 0:
        assert (given["dx"] == 0).all()
        assert (scaled == 0).all()
        assert (residual == 0).all()
        return
    assert (scaled - nfe).abs().max() <= 2
    assert distance({"dx": given["dx"] / scale}, {"dx": plain["dx"]}) <= 1e-9


def test_one_cotangent_may_serve_all_modalities(machine):
    case = Case(rows=17, n=3)
    problem = Problem(case)
    g, *rest = problem.cells
    shared = g[:1].expand_as(g)
    given, _ = machine.run(problem, "cells", given=(shared, *rest))
    expected, _ = machine.run(problem, "cells", given=(shared.contiguous(), *rest))
    assert_equal(list(given.values()), list(expected.values()))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_only_what_is_asked_for(machine, kind, cut):
    case = machine.case(cut, Case(rows=17))
    problem = Problem(case, mask=True)
    with machine.playing(cut, case):
        everything, _ = machine.run(problem, kind)
        inputs, _ = machine.run(problem, kind, want=False)
    assert {"dx"} <= inputs.keys() <= {"dx", "dcell_sum"}
    assert all(torch.equal(grad, everything[name]) for name, grad in inputs.items())


def ten_bits(t: Tensor) -> Tensor:
    """As the tensor cores round their operands."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_tf32_reaches_its_tolerance_and_float64_ignores_it(machine):
    """Its error is that of rounded weights and equilibria: a relu's sign may flip."""
    problem = Problem(Case(rows=33, dim=64, groups=4, dtype="f32"))
    for kind in ("cells", "fuse"):
        exact, _ = machine.run(problem, kind)
        given, (residual, _, outcome) = machine.run(problem, kind, tol=1e-3, allow_tf32=True)
        assert (outcome == Outcome.CONVERGED).all()
        assert (residual <= 1e-3).all()
        g, z, *rest = getattr(problem, kind)
        coarse = [
            [ten_bits(t) if t.dim() == 2 else t for t in a] if isinstance(a, list) else a
            for a in rest
        ]
        rounded, _ = problem.run(kind, cpu_native, given=(g, ten_bits(z), *coarse))
        for name, wanted in exact.items():
            error = (given[name] - wanted).norm() / wanted.norm()
            assert error > 1e-5, name
            assert error <= 4 * (rounded[name] - wanted).norm() / wanted.norm() + 4e-3, name
    problem = Problem(Case())
    plain, _ = machine.run(problem, "cells")
    allowed, _ = machine.run(problem, "cells", allow_tf32=True)
    assert torch.equal(plain["dx"], allowed["dx"])


class _Solved(torch.autograd.Function):
    """The compiled forward with the CUDA adjoint."""

    @staticmethod
    def forward(ctx, kind: str, case: Case, count: int, *tensors: Tensor) -> Tensor:
        ctx.kind, ctx.case, ctx.count = kind, case, count
        on_cpu = [t.cpu() for t in tensors]
        leaves, params = on_cpu[:count], on_cpu[count:]
        how = (1e-13, 500, 5, 1.0, 1e-6, 0)
        skip, last = case.variant != "paper", case.variant == "released-mmimdb"
        if kind == "cells":
            z = cpu_native.solve_cells(leaves[0], params, None, case.groups, skip, *how)[0]
        else:
            sizes = (case.n, case.groups, last)
            z = cpu_native.solve_fuse(*leaves, params, None, None, *sizes, *how)[0]
        z = z.to(tensors[0].device)
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
def test_gradcheck(machine, kind, variant, cut):
    case = machine.case(cut, Case(rows=2, variant=variant))
    problem = Problem(case)
    _, _, *leaves = getattr(problem, kind)
    inputs, params = leaves[: 1 if kind == "cells" else 2], leaves[1 if kind == "cells" else 2]
    tensors = [t.detach().clone().requires_grad_() for t in machine.place((*inputs, *params))]
    with machine.playing(cut, case):
        assert torch.autograd.gradcheck(
            lambda *t: _Solved.apply(kind, case, len(inputs), *t), tensors, fast_mode=True
        )


@pytest.mark.parametrize("rows", [3, 0])
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_opcheck(machine, kind, rows):
    problem = Problem(Case(rows=rows), mask=True)
    given, tail = machine.place(getattr(problem, kind)), (-1, 1e-8, 100, 6, 1.0, 1e-6)
    if kind == "cells":
        call = (*given, True, 2, False, *tail)
    else:
        call = (*given[:-1], True, given[-1], 2, 2, False, *tail)
    utils = ["test_schema", "test_faketensor"]
    result = torch.library.opcheck(
        getattr(cuda_native, f"adjoint_{kind}"), call, {"allow_tf32": True}, test_utils=utils
    )
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_repeats_change_no_bit(machine, kind, cut):
    case = machine.case(cut, Case(rows=37, n=3, dtype="f32"))
    problem = Problem(case, mask=True)
    with machine.playing(cut, case):
        first, statistics = machine.run(problem, kind)
        for _ in range(20):
            again, others = machine.run(problem, kind)
            assert_equal([*again.values(), *others], [*first.values(), *statistics])


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_a_tolerance_that_nothing_reaches_ends_as_stalled(machine, kind, cut):
    """Runs that only repeat themselves end; the answer is the best one."""
    case = machine.case(cut, Case(rows=17))
    problem = Problem(case)
    expected, _ = problem.run(kind, cpu_native)
    with machine.playing(cut, case):
        given, (residual, nfe, outcome) = machine.run(problem, kind, tol=1e-19, max_iter=5000)
    assert (outcome == Outcome.STALLED).all()
    assert (nfe < 1000).all()
    assert (residual < 1e-14).all()
    assert distance(given, expected) <= 1e-9


def steep(problem: Problem, kind: str, factor: float) -> tuple:
    """Its operands with matrices so large that J expands."""
    given = getattr(problem, kind)
    return tuple(
        [factor * t if t.dim() == 2 else t for t in a] if isinstance(a, list) else a for a in given
    )


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_a_check_that_is_worse_than_the_answer_so_far_does_not_replace_it(machine, kind, cut):
    """u = 0 has the residual 1; where the only step ends above that, it is the answer."""
    case = machine.case(cut, Case(rows=40, dim=20, groups=5))
    problem = Problem(case)
    # Wide cells expand less: of 80 rows none is worse with 8, 14 (d = 200) and 6 (d = 300) with 32.
    factor = 32 if kind == "cells" and case.dim > 100 else 8
    with machine.playing(cut, case):
        operands = steep(problem, kind, factor)
        given, (residual, *_) = machine.run(problem, kind, given=operands, max_iter=3)
    assert (residual <= 1).all()
    worse = residual == 1
    assert worse.any()
    assert not worse.all()
    assert torch.equal((given["dx"] == 0).all(-1), worse)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("kind", "factor", "tol"), [("cells", 8, 1e-5), ("fuse", 4, 2e-6)])
def test_a_row_whose_recurrence_ran_ahead_of_the_truth_starts_again(
    machine, kind, factor, tol, cut
):
    """On a steep map rounding separates the two residuals; 3% of the rows need another run."""
    case = machine.case(cut, Case(rows=200, dim=20, groups=5, dtype="f32"))
    problem = Problem(case)
    how = {"given": steep(problem, kind, factor), "tol": tol, "max_iter": 1000}
    with machine.playing(cut, case):
        _, (residual, _, outcome) = machine.run(problem, kind, **how)
    assert (outcome == Outcome.CONVERGED).double().mean() > 0.985
    assert (residual[outcome == Outcome.CONVERGED] <= tol).all()
