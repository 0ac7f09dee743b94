"""The layer as people use it: flags, warm starts, modes, copies, odd tensors, autocast."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from deqfuse import (
    Anderson,
    DEQFusion,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    SolveInfo,
    Unrolled,
)
from deqfuse.backends import BACKENDS
from deqfuse.backends.maps import VARIANTS

DIM, N, ROWS = 12, 2, 4
TIGHT = {"solver": Anderson(tol=1e-12, max_iter=500), "adjoint": Implicit(tol=1e-12, max_iter=500)}
LIMIT = 1e-9  # solutions and gradients at tolerance 1e-12, condition numbers below 1e3


@pytest.fixture
def fusion() -> DEQFusion:
    torch.manual_seed(0)
    return DEQFusion(DIM, N, num_groups=2, **TIGHT).double()


@pytest.fixture
def xs(fusion: DEQFusion) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(ROWS, DIM, dtype=torch.float64, requires_grad=True) for _ in range(N)]


def cotangents() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    g = torch.randn(N + 1, ROWS, DIM, dtype=torch.float64, generator=generator)
    return g[0], g[1:]


def gradients(fusion: DEQFusion, xs: list[Tensor]) -> list[Tensor]:
    """Of the inputs and of every parameter, for fixed random cotangents of both outputs."""
    leaves = [*xs, *fusion.parameters()]
    return list(torch.autograd.grad(fusion(xs, return_cells=True), leaves, cotangents()))


def assert_close(a: list[Tensor], b: list[Tensor]) -> None:
    for given, expected in zip(a, b, strict=True):
        torch.testing.assert_close(given, expected, rtol=LIMIT, atol=LIMIT)


# ---- what comes back -----------------------------------------------------------------------------


def test_return_flags(fusion, xs):
    z = fusion(xs)
    assert isinstance(z, Tensor)
    pair = fusion(xs, return_cells=True)
    with_info = fusion(xs, return_info=True)
    everything = fusion(xs, return_cells=True, return_info=True)
    assert [type(out) for out in (pair, with_info, everything)] == [tuple] * 3
    assert [len(out) for out in (pair, with_info, everything)] == [2, 2, 3]
    assert isinstance(with_info[1], SolveInfo)
    assert isinstance(everything[2], SolveInfo)
    assert pair[1].shape == (N, ROWS, DIM)
    assert all(torch.equal(out[0], z) for out in (pair, with_info, everything))
    assert torch.equal(pair[1], everything[1])


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
def test_info_has_the_leading_dimensions(lead):
    fusion = DEQFusion(DIM, N, num_groups=2)
    _, info = fusion([torch.randn(*lead, DIM) for _ in range(N)], return_info=True)
    assert info.converged.shape == info.nfe.shape == lead
    assert info.converged.dtype == torch.bool
    assert info.converged.all()
    for block, shape in ((info.fuse, lead), (info.cells, (N, *lead))):
        assert block.residual.shape == block.nfe.shape == block.outcome.shape == shape
        assert (block.residual <= fusion.solver.tol).all()
        assert block.nfe.dtype == torch.int32
        assert not block.residual.requires_grad
    assert info.backend in BACKENDS


def test_cells_are_differentiable(fusion, xs):
    """Each cell's equilibrium depends on its own input, and on no parameter of another block."""
    _, zs = fusion(xs, return_cells=True)
    leaves = {"x0": xs[0], "x1": xs[1], **dict(fusion.named_parameters())}
    grads = torch.autograd.grad(zs[1], list(leaves.values()), cotangents()[1][1], allow_unused=True)
    reached = {
        name for name, g in zip(leaves, grads, strict=True) if g is not None and bool(g.any())
    }
    own = {name for name in leaves if name.startswith("cells.1.")}
    assert reached == {"x1"} | own


def test_equilibrium_of_a_row_does_not_depend_on_its_batch(fusion, xs):
    whole, alone = fusion(xs), torch.cat([fusion([x[b : b + 1] for x in xs]) for b in range(ROWS)])
    torch.testing.assert_close(alone, whole, rtol=LIMIT, atol=LIMIT)


# ---- warm start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lead", [(4,), (2, 3)], ids=str)
def test_warm_start_from_the_answer_takes_one_evaluation(variant, lead):
    torch.manual_seed(0)
    options = {"solver": Anderson(tol=1e-10, max_iter=200), "num_groups": 2}
    fusion = DEQFusion(DIM, N, variant=variant, **options).double()
    with torch.no_grad():
        for cell in fusion.cells:
            cell.norm3.weight.mul_(0.3)
    xs = [torch.randn(*lead, DIM, dtype=torch.float64) for _ in range(N)]
    z, zs, cold = fusion(xs, return_cells=True, return_info=True)
    again, cells, warm = fusion(xs, z0=(z, zs), return_cells=True, return_info=True)
    assert (cold.fuse.nfe > 3).all()
    assert (cold.cells.nfe > 3).all()
    assert (warm.fuse.nfe == 1).all()
    assert (warm.cells.nfe == 1).all()
    torch.testing.assert_close(again, z, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(cells, zs, rtol=1e-8, atol=1e-8)


def test_warm_start_is_detached_and_does_not_change_the_gradient(fusion, xs):
    z0 = [torch.randn(ROWS, DIM).double(), torch.randn(N, ROWS, DIM).double()]
    z0 = tuple(t.requires_grad_() for t in z0)
    leaves = [*xs, *fusion.parameters()]
    outputs = fusion(xs, z0=z0, return_cells=True)
    given = torch.autograd.grad(outputs, leaves, cotangents(), retain_graph=True)
    assert_close(list(given), gradients(fusion, xs))
    assert torch.autograd.grad(outputs, z0, cotangents(), allow_unused=True) == (None, None)
    fusion.adjoint = Unrolled()
    outputs = fusion(xs, z0=z0, return_cells=True)
    assert torch.autograd.grad(outputs, z0, cotangents(), allow_unused=True) == (None, None)


# ---- modes ---------------------------------------------------------------------------------------


def test_gradients_follow_grad_mode_and_not_training_mode(fusion, xs):
    expected = gradients(fusion.train(), xs)
    assert_close(gradients(fusion.eval(), xs), expected)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Unrolled()], ids=repr)
def test_without_grad(fusion, xs, mode, adjoint):
    expected = fusion(xs).detach()
    fusion.adjoint = adjoint
    with mode():
        z, zs, info = fusion(xs, return_cells=True, return_info=True)
        torch.testing.assert_close(z, expected, rtol=LIMIT, atol=LIMIT)
    assert not z.requires_grad
    assert not zs.requires_grad
    assert info.converged.all()


def test_two_forwards_before_one_backward(fusion, xs):
    others = [x.detach().flip(0).requires_grad_() for x in xs]
    first, second = fusion(xs), fusion(others)
    g = cotangents()[0]
    together = torch.autograd.grad((first, second), [*xs, *others], (g, g))
    assert_close(list(together[:N]), list(torch.autograd.grad(fusion(xs), xs, g)))
    assert_close(list(together[N:]), list(torch.autograd.grad(fusion(others), others, g)))


def test_gradients_accumulate(fusion, xs):
    expected = gradients(fusion, xs)
    for _ in range(3):
        torch.autograd.backward(fusion(xs, return_cells=True), cotangents())
    given = [leaf.grad for leaf in (*xs, *fusion.parameters())]
    assert_close(given, [3 * g for g in expected])


def test_backward_twice_through_a_retained_graph(fusion, xs):
    z, g = fusion(xs), cotangents()[0]
    first = torch.autograd.grad(z, xs, g, retain_graph=True)
    assert_close(list(torch.autograd.grad(z, xs, g)), list(first))


@pytest.mark.parametrize("trainable", ["combine", "cells.1.linear2", "modality_weights", "nothing"])
def test_frozen_parameters(fusion, xs, trainable):
    expected = dict(
        zip([n for n, _ in fusion.named_parameters()], gradients(fusion, xs)[N:], strict=True)
    )
    for name, p in fusion.named_parameters():
        p.requires_grad_(name.startswith(trainable))
    torch.autograd.backward(fusion(xs, return_cells=True), cotangents())
    for name, p in fusion.named_parameters():
        if name.startswith(trainable):
            torch.testing.assert_close(p.grad, expected[name], rtol=LIMIT, atol=LIMIT)
        else:
            assert p.grad is None
    assert all(x.grad is not None for x in xs)


def test_some_inputs_without_gradient(fusion, xs):
    expected = gradients(fusion, xs)
    xs[0].requires_grad_(False)
    leaves = [xs[1], *fusion.parameters()]
    given = torch.autograd.grad(fusion(xs, return_cells=True), leaves, cotangents())
    assert_close(list(given), expected[1:])


# ---- copies --------------------------------------------------------------------------------------


def through_torch_save(fusion: DEQFusion) -> DEQFusion:
    buffer = io.BytesIO()
    torch.save(fusion, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_state_dict(fusion: DEQFusion) -> DEQFusion:
    buffer = io.BytesIO()
    torch.save(fusion.state_dict(), buffer)
    buffer.seek(0)
    fresh = DEQFusion(DIM, N, num_groups=2, **TIGHT).double()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda f: pickle.loads(pickle.dumps(f)),
        through_torch_save,
        through_state_dict,
    ],
    ids=["deepcopy", "pickle", "torch.save", "state_dict"],
)
def test_copies_give_the_same_answer_and_gradient(fusion, xs, duplicate):
    fusion(xs)  # whatever a forward leaves behind travels too
    twin = duplicate(fusion)
    assert twin.solver == fusion.solver
    assert twin.adjoint == fusion.adjoint
    assert torch.equal(twin(xs), fusion(xs))
    assert_close(gradients(twin, xs), gradients(fusion, xs))
    with torch.no_grad():
        twin.modality_weights.mul_(2)
    assert not torch.equal(twin(xs), fusion(xs))


@pytest.mark.parametrize(
    "option", [Anderson(m=3, rescue=True), NewtonKrylov(), Implicit(solver="dense"), Neumann(k=2)]
)
def test_options_survive_pickle(option):
    again = pickle.loads(pickle.dumps(option))
    assert again == option
    assert again.code == option.code


# ---- odd tensors ---------------------------------------------------------------------------------


def test_non_contiguous_and_expanded_inputs(fusion):
    wide = torch.randn(DIM, 2 * ROWS, dtype=torch.float64).T[::2]
    one = torch.randn(DIM, dtype=torch.float64).requires_grad_()
    strided, expanded = wide.detach().requires_grad_(), one.expand(ROWS, DIM)
    assert not strided.is_contiguous()
    z, g = fusion([strided, expanded]), cotangents()[0]
    given = torch.autograd.grad(z, [strided, one], g.T.contiguous().T)
    plain = [strided.detach().clone().contiguous(), expanded.detach().clone().contiguous()]
    plain = [t.requires_grad_() for t in plain]
    expected = fusion(plain)
    torch.testing.assert_close(z, expected, rtol=LIMIT, atol=LIMIT)
    grads = torch.autograd.grad(expected, plain, g)
    assert_close(list(given), [grads[0], grads[1].sum(0)])


def test_expanded_cotangent(fusion, xs):
    """What ``z.mean(0)`` sends back: a tensor with stride 0."""
    row = torch.randn(DIM, dtype=torch.float64)
    given = torch.autograd.grad(fusion(xs), xs, row.expand(ROWS, DIM))
    expected = torch.autograd.grad(fusion(xs), xs, row.repeat(ROWS, 1))
    assert_close(list(given), list(expected))


@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Neumann(), Unrolled()], ids=repr)
@pytest.mark.parametrize("options", [{}, {"gate": False}, {"weight_tied_steps": 2}], ids=str)
def test_empty_batch_forward_and_backward(adjoint, options):
    fusion = DEQFusion(DIM, N, num_groups=2, adjoint=adjoint, **options)
    xs = [torch.randn(0, DIM, requires_grad=True) for _ in range(N)]
    z, zs, info = fusion(xs, return_cells=True, return_info=True)
    assert z.shape == (0, DIM)
    assert zs.shape == (N, 0, DIM)
    assert info.converged.shape == (0,)
    (z.sum() + zs.sum()).backward()
    assert all(x.grad.shape == (0, DIM) for x in xs)
    # "No rows" is a gradient of zero.
    assert all(p.grad is None or not p.grad.any() for p in fusion.parameters())


# ---- failing rows, writing ----------------------------------------------------------------------


def test_a_poisoned_row_stays_alone(fusion, xs):
    clean = fusion(xs).detach()
    with torch.no_grad():
        xs[1][2, 3] = torch.nan
    fusion.on_failure = "ignore"
    z, info = fusion(xs, return_info=True)
    others = [0, 1, 3]
    assert info.converged.tolist() == [True, True, False, True]
    assert torch.isnan(z[2]).all()
    torch.testing.assert_close(z[others], clean[others], rtol=LIMIT, atol=LIMIT)
    g = torch.autograd.grad(z, xs, cotangents()[0])
    assert all(torch.isfinite(gi[others]).all() for gi in g)


def test_the_answers_may_be_changed_in_place(fusion, xs):
    z, zs, info = fusion(xs, return_cells=True, return_info=True)
    kept = [star.clone() for _, star, *_ in (block() for block in info.blocks)]
    z += 1
    torch.relu_(zs)
    (z.square().sum() + zs.square().sum()).backward()
    assert all(torch.equal(a, star()[1]) for a, star in zip(kept, info.blocks, strict=True))


# ---- the record of a solve -----------------------------------------------------------------------


def test_info_can_be_stored_without_its_graph(fusion, xs):
    _, info = fusion(xs, return_info=True)
    for kept in (pickle.loads(pickle.dumps(info)), copy.deepcopy(info)):
        assert torch.equal(kept.converged, info.converged)
        assert torch.equal(kept.cells.residual, info.cells.residual)
        with pytest.raises(RuntimeError, match="copy"):  # what it measured is not kept
            kept.spectral_radius()
