"""Steps, VJPs, solvers and whole modules of the cuda backend on a GPU.

Not run on one yet. Under TRITON_INTERPRET=1 they are rehearsed on the CPU; see gpu_cases.
"""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_cases import (
    CELLS,
    DEVICE,
    DTYPES,
    LARGE,
    LONG_REHEARSAL,
    MARK,
    NAMES,
    PATHS,
    REHEARSAL,
    ROWS,
    STEPPED,
    WHOLE,
    WIDE,
    anderson,
    assert_as_good_as_torch,
    in_float64,
    needs_memory,
    rehearsal,  # noqa: F401 - a fixture
    rows_off_kinks,
    solves,
    tf32,  # noqa: F401 - a fixture
)
from rounding import tf32 as truncated
from torch import Tensor

from deqfuse import DEQ, Anderson, DEQFusion, Implicit, Outcome, Picard
from deqfuse.backends import cuda, maps, reference
from deqfuse.backends.linearization import CellLinearization, FuseLinearization
from deqfuse.backends.maps import PAPER, VARIANTS, CellParams, FuseParams
from deqfuse.testing import gradient_errors

pytestmark = MARK

WIDTHS = (
    (WHOLE, WIDE) if REHEARSAL else ((50, 2), (128, 4), (300, 4), (512, 4), (1000, 4), (1000, 1))
)


def operands(dim: int, dtype: str, n: int, rows: int = ROWS):
    """A drawing of tensors, and parameters in the order of ``CellParams`` or ``FuseParams``."""
    torch.manual_seed(dim)
    stored = DTYPES[dtype]

    def draw(*shape: int, state: bool = False) -> Tensor:
        kind = reference.compute_dtype(stored) if state else stored
        return torch.randn(*shape, rows, dim, dtype=torch.float64).to(DEVICE, kind)

    def params(kinds: str) -> list[Tensor]:
        make = {
            "w": lambda: torch.randn(dim, dim) * dim**-0.5,
            "b": lambda: torch.randn(dim),
            "g": lambda: torch.rand(dim) + 0.5,
        }
        return [make[kind]().to(DEVICE, stored) for kind in kinds]

    return draw, params(n * "wbwbgbgbgb"), params("wbwbgb")


def upcast(dtype: torch.dtype, *tensors):
    return [
        [t.to(dtype) for t in v] if isinstance(v, list) else None if v is None else v.to(dtype)
        for v in tensors
    ]


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(("dim", "groups"), WIDTHS)
def test_a_cell_and_its_vjp(dim, groups, dtype, variant):
    from deqfuse.triton_kernels import cell, cell_vjp

    draw, flat, _ = operands(dim, dtype, 2)
    u, z, x = draw(2, state=True), draw(2, state=True), draw(2)

    def exact():
        z_, x_, p = upcast(torch.float64, z, x, flat)
        maps.residual_cell(z_, x_, CellParams.stack(p), groups, VARIANTS[variant])

    off = rows_off_kinks(exact, 1e-5)
    u, z, x = u[:, off], z[:, off], x[:, off]
    packed, skip = cell.pack_cells(flat), variant != "paper"
    f = cell.residual_cell(z, x, packed, groups, skip)
    given = cell_vjp.residual_cell_vjp(u, z, x, packed, groups, skip)

    def reference(kind):
        u_, z_, x_, p = upcast(kind, u, z, x, flat)
        p = CellParams.stack(p)
        at = CellLinearization(z_, x_, p, groups, VARIANTS[variant])
        dx, dp = at.vjp_operands(u_, True)
        vectors = torch.stack([dp.linear1_bias, dp.linear2_bias, *dp[4:]], 1)
        step = maps.residual_cell(z_, x_, p, groups, VARIANTS[variant])
        return [step, at.vjp(u_), dx, dp.linear1_weight, dp.linear2_weight, vectors]

    assert_as_good_as_torch([f, *given], reference)


@pytest.mark.parametrize("variant", ["paper", "released-mmimdb"])
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(("dim", "groups"), WIDTHS)
def test_purify_combine_and_its_vjp(dim, groups, dtype, variant):
    from deqfuse.triton_kernels import fuse, fuse_vjp

    draw, _, flat = operands(dim, dtype, 2)
    u, z, cell_sum, x = draw(state=True), draw(state=True), draw(state=True), draw()
    mask = 2.0 * (draw() > 0).to(x) if variant != "paper" else None
    last = variant == "released-mmimdb"

    def exact():
        z_, x_, s, p, m = upcast(torch.float64, z, x, cell_sum, flat, mask)
        p = FuseParams(*p)
        maps.purify_combine(z_, x_, maps.gate_constant(s, 2, p), m, 2, p, groups, VARIANTS[variant])

    off = rows_off_kinks(exact, 1e-5)
    u, z, cell_sum, x = u[off], z[off], cell_sum[off], x[off]
    mask = None if mask is None else mask[off]
    constant = fuse.gate_constant(cell_sum, 2, flat, groups, z.dtype)
    f = fuse.purify_combine(z, x, constant, mask, 2, flat, groups, last)
    given = fuse_vjp.purify_combine_vjp(u, z, x, cell_sum, mask, 2, flat, groups, last)

    def reference(kind):
        u_, z_, x_, s, p, m = upcast(kind, u, z, x, cell_sum, flat, mask)
        p = FuseParams(*p)
        c = maps.gate_constant(s, 2, p)
        at = FuseLinearization(z_, x_, s, m, 2, p, groups, VARIANTS[variant])
        dx, dsum, dp = at.vjp_operands(u_, True)
        step = maps.purify_combine(z_, x_, c, m, 2, p, groups, VARIANTS[variant])
        return [c, step, at.vjp(u_), dx, dsum, *dp]

    assert_as_good_as_torch([constant, f, *given[:3], *given.params], reference)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(("dim", "groups"), WIDTHS)
def test_tf32_steps_err_as_much_as_rounded_operands(dim, groups, monkeypatch):
    """As PyTorch does with operands cut to 10 bits, and no less: TF32 is what is used."""
    from deqfuse.triton_kernels import cell, fuse

    draw, cells, flat = operands(dim, "f32", 2)
    z, x, constant = draw(2, state=True), draw(2), draw(state=True)
    step = cell.residual_cell(z, x, cell.pack_cells(cells), groups, False)
    fused = fuse.purify_combine(z[0], x[0], constant, None, 2, flat, groups, False)

    def reference(kind):
        z_, x_, c, p, q = upcast(kind, z, x, constant, cells, flat)
        return (
            maps.residual_cell(z_, x_, CellParams.stack(p), groups, PAPER),
            maps.purify_combine(z_[0], x_[0], c, None, 2, FuseParams(*q), groups, PAPER),
        )

    exact = reference(torch.float64)
    linear, addmm = maps.linear, torch.addmm
    monkeypatch.setattr(maps, "linear", lambda a, w, b: linear(truncated(a), truncated(w), b))
    monkeypatch.setattr(
        torch, "addmm", lambda c, a, w, **k: addmm(c, truncated(a), truncated(w.mT).mT, **k)
    )
    for mine, wanted, rounded in zip((step, fused), exact, reference(torch.float32), strict=True):
        error, expected = (mine - wanted).norm(), (rounded - wanted).norm()
        assert error <= 2 * expected
        assert REHEARSAL or error >= expected / 16, "the interpreter's products are exact"


@PATHS
@pytest.mark.parametrize(
    "solver",
    [
        Picard(tol=1e-5),
        Picard(tol=1e-5, beta=0.7),
        anderson(tol=1e-5, m=1),
        anderson(tol=1e-5, beta=0.6),
        anderson(tol=1e-5, m=3, lam=1e-3),
    ],
    ids=repr,
)
def test_solvers(dim, groups, solver):
    exacts = solves(dim, groups, backend=reference)
    for solve, exact in zip(solves(dim, groups), exacts, strict=True):
        truth = exact.func(*map(in_float64, exact.args), Anderson(tol=1e-11, max_iter=200))
        for _ in range(1 if REHEARSAL else 3):  # steps, capture, replay
            given = solve(solver)
            assert (given.outcome == Outcome.CONVERGED).all()
            error = (given.z - truth.z).norm(dim=-1) / truth.z.norm(dim=-1)
            assert (error <= 4 * solver.tol).all()


@PATHS
def test_traces_hold_every_evaluation_and_nothing_else(dim, groups):
    solver = anderson(tol=1e-5, trace=True)
    for solve in solves(dim, groups):
        for _ in range(1 if REHEARSAL else 3):  # steps, capture, replay
            given = solve(solver)
            assert len(given.trace) == solver.max_iter
            assert torch.equal(given.trace.isfinite().sum(0), given.nfe)
            last = given.trace.gather(0, (given.nfe - 1).long()[None])[0]
            assert torch.equal(last, given.residual), "a converged row ends with its best"


@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("m", (2, 8) if REHEARSAL else range(1, 9))
def test_the_anderson_step(m, dtype):
    """Every history, for rows longer than a block, against the reference in float64."""
    torch.manual_seed(m)
    rows, n = (3, 9) if REHEARSAL else (300, 2500)
    x = torch.randn(rows, n, dtype=torch.float64)
    gain = torch.linspace(0, 0.6, rows, dtype=torch.float64)[:, None]
    solver = Anderson(m=m, tol=1e-9 if dtype == "f64" else 1e-5, max_iter=60)

    def solve(module, device, kind):
        x_, gain_ = x.to(device, kind), gain.to(device, kind)
        start = torch.zeros_like(x_)
        return module(lambda z: gain_ * torch.cos(z.roll(1, 1)) + x_, start, solver)

    given = solve(cuda.anderson, DEVICE, DTYPES[dtype])
    expected = solve(reference.anderson, "cpu", torch.float64)
    assert (given.outcome == Outcome.CONVERGED).all()
    assert (given.nfe.cpu() - expected.nfe).abs().max() <= 1
    error = (given.z.cpu() - expected.z).norm(dim=-1) / expected.z.norm(dim=-1)
    assert (error <= 4 * solver.tol).all()


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_any_map_takes_the_fused_anderson_step(dtype, monkeypatch):
    """Values and the gradient to a closed-over weight against float64 on the CPU."""
    torch.manual_seed(0)
    rows, n = (5, 30) if REHEARSAL else (40, 300)
    start, x, target = torch.zeros(rows, n), torch.randn(rows, n), torch.randn(rows, n)
    matrix = 0.5 * torch.randn(n, n) / n**0.5

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
    z, gradient, info = run(DEVICE, DTYPES[dtype], tol)
    assert info.backend == "cuda"
    assert info.converged.all()
    monkeypatch.setenv("DEQFUSE_BACKEND", "reference")
    truth, wanted, _ = run("cpu", torch.float64, 1e-12)
    # |J| is below 1/2 * 2 = 1 (a random matrix's largest singular value): 1 / (1 - |J|) is moderate
    assert (z - truth).norm() <= 20 * tol * truth.norm()
    assert (gradient - wanted).norm() <= 100 * tol * wanted.norm()


@PATHS
def test_a_layers_gradients(dim, groups):
    torch.manual_seed(0)
    tight = {"solver": anderson(tol=1e-6), "adjoint": Implicit(tol=1e-6)}
    layer = DEQFusion(dim, CELLS, num_groups=groups, **tight)
    exact = copy.deepcopy(layer).double()
    exact.backend = "reference"
    exact.solver = Anderson(tol=1e-12, max_iter=200)
    exact.adjoint = Implicit(tol=1e-12, max_iter=200)
    xs, cotangent = torch.randn(CELLS, ROWS, dim), torch.randn(ROWS, dim)
    with torch.no_grad():
        z, z_cells = exact(list(xs.double()), return_cells=True)
        exact.solver = Anderson(tol=1e-6, max_iter=1)  # one evaluation, at the equilibrium
        off = rows_off_kinks(lambda: exact(list(xs.double()), z0=(z, z_cells)), 1e-4)
    exact.solver = Anderson(tol=1e-12, max_iter=200)
    xs, cotangent = xs[:, off], cotangent[off]

    def gradients(layer, device, dtype):
        layer.to(device)
        inputs = [x.to(device, dtype).requires_grad_() for x in xs]
        z, info = layer(inputs, return_info=True)
        z.backward(cotangent.to(z))
        found = [*inputs, *layer.parameters()]
        return [t.grad.cpu().double() for t in found], info

    given, info = gradients(layer, DEVICE, torch.float32)
    assert info.backend == "cuda"
    assert info.converged.all()
    for mine, wanted in zip(given, gradients(exact, "cpu", torch.float64)[0], strict=True):
        assert (mine - wanted).norm() <= 1e-4 * wanted.norm()


@LONG_REHEARSAL
def test_a_float64_layers_gradients_are_the_dense_ones():
    torch.manual_seed(0)
    rows, dim, groups, steps = (1, 12, 3, 30) if REHEARSAL else (4, 16, 4, 200)
    tight = {"solver": Anderson(tol=1e-11, max_iter=steps), "adjoint": Implicit(tol=1e-11)}
    layer = DEQFusion(dim, 2, num_groups=groups, **tight).double().to(DEVICE)
    features = [torch.randn(rows, dim, dtype=torch.float64).to(DEVICE) for _ in range(2)]
    assert layer(features, return_info=True)[1].backend == "cuda"
    assert max(gradient_errors(layer, features).values()) < 1e-8


@pytest.mark.filterwarnings("error::deqfuse.ConvergenceWarning")
@PATHS
def test_a_layer_learns(dim, groups):
    """From a warm start every other step, with dropout: the loss falls."""
    torch.manual_seed(0)
    rows, steps, least = (ROWS, 3, 0.99) if REHEARSAL else (60, 20, 0.7)
    layer = DEQFusion(dim, 2, num_groups=groups, dropout=0.1, solver=anderson()).to(DEVICE)
    head = torch.nn.Linear(dim, 3).to(DEVICE)
    xs, labels = list(torch.randn(2, rows, dim).to(DEVICE)), torch.arange(rows).to(DEVICE) % 3
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 1e-2)
    losses, start = [], None
    for step in range(steps):
        z, cells = layer(xs, return_cells=True, z0=start)
        start = (z.detach(), cells.detach()) if step % 2 else None
        loss = torch.nn.functional.cross_entropy(head(z), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < least * losses[0]


# ---- offsets: over 2^31 numbers in each tensor, of which the last rows are looked at ------------

DIM, GROUPS, MANY = (*STEPPED, 70) if REHEARSAL else (1024, 4, 2_100_000)
TAIL = slice(-40, None)


@LARGE
def test_a_cells_offsets_beyond_31_bits():
    """Three tensors for the step, six for its VJP: 52 GB."""
    needs_memory(60)
    from deqfuse.triton_kernels import cell, cell_vjp

    packed = cell.pack_cells(operands(DIM, "f32", 1, rows=1)[1])
    z = torch.randn(1, MANY, DIM, device=DEVICE)
    few = z[:, TAIL].contiguous()
    out = cell.residual_cell(z, z, packed, GROUPS, False)
    assert torch.equal(cell.residual_cell(few, few, packed, GROUPS, False), out[:, TAIL])
    del out
    given = cell_vjp.residual_cell_vjp(z, z, z, packed, GROUPS, False, want_params=False)
    wanted = cell_vjp.residual_cell_vjp(few, few, few, packed, GROUPS, False, want_params=False)
    assert torch.equal(given.dz[:, TAIL], wanted.dz)
    assert torch.equal(given.dx[:, TAIL], wanted.dx)


@LARGE
def test_purify_combines_offsets_beyond_31_bits():
    """Three tensors for the step, eight for its VJP: 69 GB."""
    needs_memory(75)
    from deqfuse.triton_kernels import fuse, fuse_vjp

    params = operands(DIM, "f32", 1, rows=1)[2]
    z = torch.randn(MANY, DIM, device=DEVICE)
    few = z[TAIL].contiguous()
    rest = (None, 2, params, GROUPS, False)
    out = fuse.purify_combine(z, z, z, *rest)
    assert torch.equal(fuse.purify_combine(few, few, few, *rest), out[TAIL])
    del out
    given = fuse_vjp.purify_combine_vjp(z, z, z, z, *rest, want_params=False)
    wanted = fuse_vjp.purify_combine_vjp(few, few, few, few, *rest, want_params=False)
    for mine, alone in zip(given[:3], wanted[:3], strict=True):
        assert torch.equal(mine[TAIL], alone)


@LARGE
def test_the_anderson_steps_offsets_beyond_31_bits():
    """Twice as many numbers in each ring of the history: 69 GB."""
    needs_memory(70)
    from deqfuse.triton_kernels.anderson import AndersonState, anderson_step

    def two_steps(z0):
        state = AndersonState(z0, 2, 0)
        state.z.copy_(z0)
        image = torch.empty_like(z0)
        for step in range(2):
            torch.cos(state.z, out=image)  # a second image would be 8 GB more
            anderson_step(image, state, step, tol=1e-6, max_iter=50, beta=1.0, lam=1e-6)
        return state.z[TAIL].clone(), state.best[TAIL].clone()

    z = torch.randn(MANY, DIM, device=DEVICE)
    for mine, wanted in zip(two_steps(z), two_steps(z[TAIL].clone()), strict=True):
        assert torch.equal(mine, wanted)
