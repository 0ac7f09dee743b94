"""What the compiled solves are made of: products as exact as float32, wide tiles, plain first
steps, memory that is kept."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import platform
import resource
from pathlib import Path

import pytest
import torch
from cpu_cases import Case, assert_equal, flat_cells
from torch import Tensor

from deqfuse import Anderson, DEQFusion, Implicit, Picard, functional
from deqfuse.backends import cpu_native

SIZES = [(1, 12, 4), (15, 20, 4), (33, 33, 3), (70, 50, 2), (40, 300, 4), (17, 513, 3)]
SIZES += [(257, 768, 4)]


def error(given: Tensor, exact: Tensor) -> float:
    return ((given - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("rows", "dim", "groups"), SIZES)
def test_an_evaluation_is_as_exact_as_torchs(rows, dim, groups):
    """Against float64, whatever unit multiplies: no further away than torch in float32."""
    case = Case(rows, dim, groups, dtype="f32")
    params, x, z0 = flat_cells(case.layer()), case.draw(2), case.draw(2)

    def step(dtype: torch.dtype, backend: str) -> Tensor:
        given = [t.detach().to(dtype) for t in params]
        solve = functools.partial(functional.solve_cells, num_groups=groups, on_failure="ignore")
        start = z0.to(dtype)
        return solve(x.to(dtype), given, z0=start, solver=Picard(max_iter=1), backend=backend)[0]

    exact = step(torch.float64, "reference")
    ours, torchs = (error(step(torch.float32, name), exact) for name in ("cpu", "reference"))
    assert ours <= max(1.2 * torchs, 2e-7)


@pytest.mark.parametrize(("rows", "dim", "groups"), SIZES)
def test_weight_gradients_are_as_exact_as_torchs(rows, dim, groups):
    """One VJP at a given equilibrium, without a solve: products over the rows of a batch."""
    torch.manual_seed(0)
    layer = DEQFusion(dim, 2, num_groups=groups, on_failure="ignore", adjoint=Implicit(tol=1e-6))
    xs, g = [torch.randn(rows, dim) for _ in range(2)], torch.randn(rows, dim)

    def gradients(dtype: torch.dtype, backend: str, tol: float) -> Tensor:
        layer.to(dtype).backend, layer.solver = backend, Anderson(tol=tol, max_iter=60)
        layer.adjoint = Implicit(tol=tol)
        z = layer([x.to(dtype) for x in xs])
        weights = [p for p in layer.parameters() if p.dim() == 2]
        return torch.cat([t.flatten() for t in torch.autograd.grad(z, weights, g.to(dtype))])

    exact = gradients(torch.float64, "cpu", 1e-11)
    ours, torchs = (error(gradients(torch.float32, b, 1e-6), exact) for b in ("cpu", "reference"))
    assert ours <= max(3 * torchs, 1e-6)


def test_wide_tiles_keep_rows_apart():
    """At d = 768 and 257 rows a tile may hold four vectors: the rows alone give the same bits."""
    case = Case(257, 768, 4, 1, dtype="f32")
    layer = case.layer(backend="cpu")
    x, g = case.draw(), case.draw()

    def run(index) -> list[Tensor]:
        leaf = x[index].clone().requires_grad_()
        z, info = layer([leaf], return_info=True)
        return [z.detach(), info.fuse.nfe, *torch.autograd.grad(z, leaf, g[index])]

    together, seen = run(slice(None)), set()
    for index in (slice(0, 1), slice(60, 67), slice(250, 257), slice(0, 64)):
        assert_equal(run(index), [t[index] for t in together])
        seen.add(cpu_native.module.plan(len(range(257)[index]), 768)["rows_per_tile"])
    seen.add(cpu_native.module.plan(257, 768)["rows_per_tile"])
    if cpu_native.module.build_info()["vector_bytes"] == 64:
        sizes = [(256, 768), (255, 768), (256, 767), (64, 20), (63, 20)]
        plans = [cpu_native.module.plan(*size)["rows_per_tile"] for size in sizes]
        assert plans == [64, 32, 32, 32, 16]
    assert len(seen) >= 2, "tiles of one width only say nothing"


# ---- plain first steps ---------------------------------------------------------------------------


def shrinking(factor: float, dim: int = 64) -> tuple[DEQFusion, list[Tensor]]:
    """The default draw contracts about tenfold a step; here its gains are `factor` of that."""
    torch.manual_seed(0)
    layer = DEQFusion(dim, 2, backend="cpu", on_failure="ignore", injection_norm=False)
    with torch.no_grad():
        for part in (*(cell.linear2 for cell in layer.cells), layer.combine.fuse):
            part.weight.mul_(factor)
    return layer, [torch.randn(50, dim) for _ in range(2)]


@pytest.mark.parametrize("factor", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-6])
def test_plain_first_steps_cost_hardly_an_evaluation(factor, tol):
    """However fast the map contracts, against the reference, which mixes and judges at once."""
    layer, xs = shrinking(factor)
    layer.solver, counts = Anderson(tol=tol), {}
    for layer.backend in ("cpu", "reference"):
        info = layer(xs, return_info=True)[1]
        assert info.converged.all()
        counts[layer.backend] = torch.cat([info.cells.nfe, info.fuse.nfe[None]]).double()
    assert (counts["cpu"] <= counts["reference"] + 1).double().mean() > 0.98
    assert counts["cpu"].mean() <= counts["reference"].mean() + (1 if tol > 1e-3 else 0.2)


@pytest.mark.parametrize(
    ("solver", "evaluations"),
    [
        (Anderson(), 3),  # f(0), a plain step, one that is judged
        (Anderson(max_iter=9), 3),
        (Anderson(max_iter=8), 2),
        (Picard(), 2),
    ],
    ids=repr,
)
def test_no_row_ends_in_a_plain_step(solver, evaluations):
    """A map that does not look at z is solved by the second evaluation, judged or not."""
    layer, xs = shrinking(0.0)
    layer.solver = dataclasses.replace(solver, trace=True)
    z, info = layer(xs, return_info=True)
    for block in (info.cells, info.fuse):
        assert (block.nfe == evaluations).all()
        assert (block.trace[1:evaluations] == 0).all()
        assert block.trace[evaluations:].isnan().all()
    layer.solver = solver
    assert torch.equal(layer(xs), z), "a trace changes no answer"


@pytest.mark.parametrize(("rows", "dim", "groups"), SIZES)
def test_plain_first_steps_follow_the_map(rows, dim, groups):
    """Their residuals are those of plain steps in float64, to a tenth of the default tolerance.

    Products of some digits: 16-bit integers err by 2e-4 of a product, and the default
    gain passes a tenth of that on.
    """
    case = Case(rows, dim, groups, dtype="f32")
    layer, xs = case.layer(init="contractive"), list(case.draw(case.n))
    layer.backend, layer.solver = "cpu", Anderson(tol=1e-6, max_iter=50, trace=True)
    ours = layer(xs, return_info=True)[1]
    layer.double().backend, layer.solver = "reference", Picard(tol=1e-6, max_iter=50, trace=True)
    exact = layer([x.double() for x in xs], return_info=True)[1]
    for block in ("cells", "fuse"):
        seen, wanted = (getattr(info, block).trace[:3].double() for info in (ours, exact))
        slow = wanted[2] > 0.25 * wanted[1]  # narrow groups: such a row may have left plain steps
        assert slow.double().mean() < 0.2
        assert ((seen - wanted).abs() <= 1e-5 + 0.01 * wanted)[:, ~slow].all()


@pytest.mark.parametrize("dim", [64, 600])
@pytest.mark.parametrize("shape", ["equal", "single"])
def test_plain_first_steps_of_lopsided_weights(shape, dim):
    """Rows of weights that are all alike, or all in one place: sums of the largest size.

    Alike weights are all rounded alike, by up to sqrt(256) / 65400 of the sum, 7.2 at most here.
    """
    layer, xs = shrinking(1.0, dim)
    with torch.no_grad():
        for cell in layer.cells:
            cell.norm1.bias.fill_(3.0)  # the second product's input is positive, its sums large
            alike = torch.full((dim, dim), 0.1 / dim**0.5)
            alike = alike if shape == "equal" else 0.1 * torch.eye(dim)
            cell.linear2.weight.copy_(alike * (torch.rand(dim, 1) + 0.5))
    layer.solver, found = Anderson(tol=1e-3), {}
    for layer.backend in ("cpu", "reference"):
        found[layer.backend], info = layer(xs, return_info=True)
        assert info.converged.all()
        found[layer.backend + " nfe"] = info.cells.nfe.double().mean()
    assert (found["cpu"] - found["reference"]).abs().max() < 1e-4
    assert found["cpu nfe"] <= found["reference nfe"] + 1


@pytest.mark.parametrize(("rows", "dim", "groups"), SIZES)
def test_plain_first_steps_backwards(rows, dim, groups):
    """The adjoint's plain steps lead where those in float64 do: it takes as many applications.

    Weights whose rows and columns differ in size: an integer scaled by another's norm would show.
    """
    case, numbers = Case(rows, dim, groups, dtype="f32"), (-1, 1e-4, 60, 6, 1.0, 1e-6)
    layer, x, g = case.layer(init="contractive"), case.draw(case.n), case.draw(case.n)
    sizes = torch.logspace(-1, 1, dim)[torch.randperm(dim)]
    with torch.no_grad():
        for cell in layer.cells:
            cell.linear1.weight.mul_(sizes)  # GN1 makes its scale irrelevant
            cell.linear2.weight.mul_(sizes[:, None] / sizes.square().mean().sqrt())
    solver = Anderson(tol=1e-6, max_iter=100)
    counts = {}
    for dtype in (torch.float32, torch.float64):
        params = [t.detach().to(dtype) for t in flat_cells(layer)]
        given = {"num_groups": groups, "solver": solver, "on_failure": "ignore"}
        z = functional.solve_cells(x.to(dtype), params, backend="cpu", **given)[0]
        skip = layer.variant != "paper"
        *_, nfe, outcome = cpu_native.adjoint_cells(
            g.to(dtype), z, x.to(dtype), params, False, groups, skip, *numbers
        )
        counts[dtype] = nfe.double()[outcome == 0]
        assert len(counts[dtype]) > 0.9 * nfe.numel()
    assert counts[torch.float32].mean() <= counts[torch.float64].mean() + 0.2


def test_warm_starts_are_judged_at_once():
    layer, xs = shrinking(0.0)
    z, zs, _ = layer(xs, return_cells=True, return_info=True)
    info = layer(xs, z0=(z, zs), return_info=True)[1]
    assert (info.cells.nfe == 1).all()
    assert (info.fuse.nfe == 1).all()


@pytest.mark.parametrize(("dim", "groups"), [(16, 8), (32, 16), (64, 32)])
def test_rows_whose_plain_steps_lead_away(dim, groups):
    """Groups of two features: some rows' J^T expands, and a plain step makes them worse."""
    torch.manual_seed(0)
    layer = DEQFusion(dim, 3, num_groups=groups, backend="cpu", on_failure="ignore")
    xs = [torch.randn(4096, dim, requires_grad=True) for _ in range(3)]
    z = layer(xs)
    grads = torch.autograd.grad(z, [*xs, *layer.parameters()], torch.randn_like(z))
    assert all(g.isfinite().all() for g in grads)


# ---- memory that is kept -------------------------------------------------------------------------


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="measured by glibc's malloc_trim")
def test_what_is_kept_between_calls_is_bounded():
    """Steps of ever new sizes: of what they work in, 128 MB outlive them."""

    def resident() -> int:
        ctypes.CDLL(None).malloc_trim(0)  # what malloc itself holds back
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    layer = DEQFusion(128, 1, backend="cpu", on_failure="ignore")
    before = resident()
    for rows in range(10_000, 60_000, 10_000):  # their weights' gradients alone need 460 MB
        layer([torch.randn(rows, 128)]).square().mean().backward()
    assert resident() - before < 160e6
