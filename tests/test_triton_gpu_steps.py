"""Steps, VJPs, solvers and whole modules of the cuda backend on a GPU. Not run on one yet."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor

from deqfuse import DEQ, Anderson, DEQFusion, Implicit, Outcome, Picard
from deqfuse.backends import cuda, maps, reference
from deqfuse.backends.linearization import CellLinearization, FuseLinearization
from deqfuse.backends.maps import CellParams, FuseParams
from deqfuse.testing import gradient_errors

pytestmark = pytest.mark.gpu

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}
WIDTHS = ((50, 2), (128, 4), (300, 4), (512, 4), (1000, 4))
PATHS = pytest.mark.parametrize(("dim", "groups"), [(128, 4), (300, 4)], ids=["whole", "stepped"])


def assert_as_good_as_torch(given: list[Tensor], reference) -> None:
    """Each output errs at most 8 times as much as PyTorch in the same precision, or rounding."""
    dtype = given[0].dtype
    truth, other = reference(torch.float64), reference(dtype)
    assert len(given) == len(truth)
    for i, (mine, wanted, torchs) in enumerate(zip(given, truth, other, strict=True)):
        error, scale = (mine - wanted).norm(), torch.finfo(dtype).eps * wanted.norm()
        limit = 8 * scale if dtype == torch.float64 else 8 * (torchs - wanted).norm() + scale
        assert error <= limit, (i, error / scale)


def operands(dim: int, dtype: str, n: int, rows: int = 77):
    """A drawing of tensors, and parameters in the order of ``CellParams`` or ``FuseParams``."""
    torch.manual_seed(dim)
    stored = DTYPES[dtype]

    def draw(*shape: int, state: bool = False) -> Tensor:
        kind = reference.compute_dtype(stored) if state else stored
        return torch.randn(*shape, rows, dim, dtype=torch.float64).to("cuda", kind)

    def params(kinds: str) -> list[Tensor]:
        make = {
            "w": lambda: torch.randn(dim, dim) * dim**-0.5,
            "b": lambda: torch.randn(dim),
            "g": lambda: torch.rand(dim) + 0.5,
        }
        return [make[kind]().to("cuda", stored) for kind in kinds]

    return draw, params(n * "wbwbgbgbgb"), params("wbwbgb")


def upcast(dtype: torch.dtype, *tensors):
    return [
        [t.to(dtype) for t in v] if isinstance(v, list) else None if v is None else v.to(dtype)
        for v in tensors
    ]


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "groups"), WIDTHS)
def test_a_cell_and_its_vjp(dim, groups, dtype, variant):
    from deqfuse.triton_kernels import cell, cell_vjp

    draw, flat, _ = operands(dim, dtype, 2)
    u, z, x = draw(2, state=True), draw(2, state=True), draw(2)
    packed, skip = cell.pack_cells(flat), variant != "paper"
    f = cell.residual_cell(z, x, packed, groups, skip)
    given = cell_vjp.residual_cell_vjp(u, z, x, packed, groups, skip)

    def reference(kind):
        u_, z_, x_, p = upcast(kind, u, z, x, flat)
        p = CellParams.stack(p)
        at = CellLinearization(z_, x_, p, groups, variant)
        dx, dp = at.vjp_operands(u_, True)
        vectors = torch.stack([dp.linear1_bias, dp.linear2_bias, *dp[4:]], 1)
        step = maps.residual_cell(z_, x_, p, groups, variant)
        return [step, at.vjp(u_), dx, dp.linear1_weight, dp.linear2_weight, vectors]

    assert_as_good_as_torch([f, *given], reference)


@pytest.mark.parametrize("variant", ["paper", "released-mmimdb"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "groups"), WIDTHS)
def test_purify_combine_and_its_vjp(dim, groups, dtype, variant):
    from deqfuse.triton_kernels import fuse, fuse_vjp

    draw, _, flat = operands(dim, dtype, 2)
    u, z, cell_sum, x = draw(state=True), draw(state=True), draw(state=True), draw()
    mask = 2.0 * (draw() > 0).to(x) if variant != "paper" else None
    last = variant == "released-mmimdb"
    constant = fuse.gate_constant(cell_sum, 2, flat, groups, z.dtype)
    f = fuse.purify_combine(z, x, constant, mask, 2, flat, groups, last)
    given = fuse_vjp.purify_combine_vjp(u, z, x, cell_sum, mask, 2, flat, groups, last)

    def reference(kind):
        u_, z_, x_, s, p, m = upcast(kind, u, z, x, cell_sum, flat, mask)
        p = FuseParams(*p)
        c = maps.gate_constant(s, 2, p)
        at = FuseLinearization(z_, x_, s, m, 2, p, groups, variant)
        dx, dsum, dp = at.vjp_operands(u_, True)
        step = maps.purify_combine(z_, x_, c, m, 2, p, groups, variant)
        return [c, step, at.vjp(u_), dx, dsum, *dp]

    assert_as_good_as_torch([constant, f, *given[:3], *given.params], reference)


def block_solves(dim, groups, backend, dtype=torch.float32):
    """Both solves of a layer, as functions of the solver."""
    torch.manual_seed(0)
    layer = DEQFusion(dim, 2, num_groups=groups).requires_grad_(False).to("cuda", dtype)
    x, cell_sum = (torch.randn(2, 33, dim).to("cuda", dtype) for _ in range(2))
    flat = [t for part in layer.cells for t in part.flat()]
    fuse = (x.sum(0), cell_sum[0], layer.combine.flat(), None, None, 2)
    return [
        functools.partial(backend.solve_cells, x, flat, None, groups, "paper"),
        functools.partial(backend.solve_fuse, *fuse, groups, "paper"),
    ]


@PATHS
@pytest.mark.parametrize(
    "solver",
    [
        Picard(tol=1e-5),
        Picard(tol=1e-5, beta=0.7),
        Anderson(tol=1e-5, m=1),
        Anderson(tol=1e-5, beta=0.6),
        Anderson(tol=1e-5, m=3, lam=1e-3),
    ],
    ids=repr,
)
def test_solvers(dim, groups, solver):
    exacts = block_solves(dim, groups, reference, torch.float64)
    for solve, exact in zip(block_solves(dim, groups, cuda), exacts, strict=True):
        truth = exact(Anderson(tol=1e-11, max_iter=200))
        for _ in range(3):  # steps, capture, replay
            given = solve(solver)
            assert (given.outcome == Outcome.CONVERGED).all()
            error = (given.z - truth.z).norm(dim=-1) / truth.z.norm(dim=-1)
            assert (error <= 4 * solver.tol).all()


@PATHS
def test_traces_hold_every_evaluation_and_nothing_else(dim, groups):
    solver = Anderson(tol=1e-5, trace=True)
    for solve in block_solves(dim, groups, cuda):
        for _ in range(3):  # steps, capture, replay
            given = solve(solver)
            assert len(given.trace) == solver.trace_length
            assert torch.equal(given.trace.isfinite().sum(0), given.nfe)
            last = given.trace.gather(0, (given.nfe - 1).long()[None])[0]
            assert torch.equal(last, given.residual), "a converged row ends with its best"


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_any_map_takes_the_fused_anderson_step(dtype):
    """Values and the gradient to a closed-over weight against float64 on the CPU."""
    kind = DTYPES[dtype]
    torch.manual_seed(0)
    start, x = torch.zeros(40, 300), torch.randn(40, 300)
    matrix, target = 0.5 * torch.randn(300, 300) / 300**0.5, torch.randn(40, 300)

    def run(device, kind, tol):
        weight = matrix.to(device, kind, copy=True).requires_grad_()
        deq = DEQ(
            lambda z, x: torch.tanh(z @ weight + x),
            solver=Anderson(tol=tol, max_iter=100),
            adjoint=Implicit(tol=tol, max_iter=200),
        )
        z, info = deq(start.to(device, kind), x.to(device, kind))
        z.backward(target.to(z))
        return z.detach().cpu().double(), weight.grad.cpu().double(), info

    tol = 1e-5 if dtype == "f32" else 1e-9
    z, gradient, info = run("cuda", kind, tol)
    truth, wanted, _ = run("cpu", torch.float64, 1e-12)
    assert info.backend == "cuda"
    assert info.converged.all()
    # |J| is below 1/2 * 2 = 1 (a random matrix's largest singular value): 1 / (1 - |J|) is moderate
    assert (z - truth).norm() <= 20 * tol * truth.norm()
    assert (gradient - wanted).norm() <= 100 * tol * wanted.norm()


@PATHS
def test_a_layers_gradients(dim, groups):
    torch.manual_seed(0)
    tight = {"solver": Anderson(tol=1e-6), "adjoint": Implicit(tol=1e-6)}
    layer = DEQFusion(dim, 3, num_groups=groups, **tight)
    exact = copy.deepcopy(layer).double()
    exact.solver, exact.adjoint = (
        Anderson(tol=1e-12, max_iter=200),
        Implicit(tol=1e-12, max_iter=200),
    )
    xs, cotangent = torch.randn(3, 40, dim), torch.randn(40, dim)

    def gradients(layer, device, dtype):
        layer.to(device)
        inputs = [x.to(device, dtype).requires_grad_() for x in xs]
        z, info = layer(inputs, return_info=True)
        z.backward(cotangent.to(z))
        found = [*inputs, *layer.parameters()]
        return [t.grad.cpu().double() for t in found], info

    given, info = gradients(layer, "cuda", torch.float32)
    assert info.backend == "cuda"
    assert info.converged.all()
    for mine, wanted in zip(given, gradients(exact, "cpu", torch.float64)[0], strict=True):
        assert (mine - wanted).norm() <= 1e-4 * wanted.norm()


def test_a_float64_layers_gradients_are_the_dense_ones():
    torch.manual_seed(0)
    tight = {"solver": Anderson(tol=1e-11, max_iter=200), "adjoint": Implicit(tol=1e-11)}
    layer = DEQFusion(16, 3, **tight).double().to("cuda")
    features = [torch.randn(4, 16, dtype=torch.float64).to("cuda") for _ in range(3)]
    assert layer(features, return_info=True)[1].backend == "cuda"
    assert max(gradient_errors(layer, features).values()) < 1e-8


@pytest.mark.filterwarnings("error::deqfuse.ConvergenceWarning")
@pytest.mark.parametrize("dim", [64, 300], ids=["whole", "stepped"])
def test_a_layer_learns(dim):
    """From a warm start every other step, with dropout: the loss falls."""
    torch.manual_seed(0)
    layer = DEQFusion(dim, 2, dropout=0.1).to("cuda")
    head = torch.nn.Linear(dim, 3).to("cuda")
    xs, labels = list(torch.randn(2, 60, dim).to("cuda")), torch.arange(60).to("cuda") % 3
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 1e-3)
    losses, start = [], None
    for step in range(20):
        z, cells = layer(xs, return_cells=True, z0=start)
        start = (z.detach(), cells.detach()) if step % 2 else None
        loss = torch.nn.functional.cross_entropy(head(z), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_offsets_beyond_31_bits():
    """Over 2^31 numbers in each tensor, twice that in the ring; takes about 60 GB."""
    if torch.cuda.get_device_properties(0).total_memory < 70 << 30:
        pytest.skip("needs a GPU with 70 GB")
    from deqfuse.triton_kernels import fuse
    from deqfuse.triton_kernels.anderson import AndersonState, anderson_step

    dim, rows, tail = 1024, 2_100_000, slice(-40, None)
    _, _, params = operands(dim, "f32", 1, rows=1)
    z = torch.randn(rows, dim, device="cuda")
    out = fuse.purify_combine(z, z, z, None, 2, params, 4, False)
    few = z[tail]
    assert torch.equal(fuse.purify_combine(few, few, few, None, 2, params, 4, False), out[tail])
    del out

    def two_steps(z0):
        state = AndersonState(z0, 2, 0)
        state.z.copy_(z0)
        for step in range(2):
            image = torch.cos(state.z)
            anderson_step(image, state, step, tol=1e-6, max_iter=50, beta=1.0, lam=1e-6)
        return state.z[tail].clone(), state.best[tail].clone()

    for mine, wanted in zip(two_steps(z), two_steps(few.clone()), strict=True):
        assert torch.equal(mine, wanted)
