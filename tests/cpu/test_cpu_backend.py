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
from cpu_cases import (
    DTYPES,
    FULL,
    LOOSE,
    ROWS,
    SIZES,
    TIGHT,
    Case,
    as_compiled,
    assert_same_solution,
    flat_cells,
    leaves_of,
    named,
)
from torch import Tensor

from deqfuse import (
    Anderson,
    BackendUnavailable,
    Broyden,
    DEQFusion,
    Implicit,
    NewtonKrylov,
    Outcome,
    Picard,
    Unrolled,
    functional,
)
from deqfuse.backends import cpu, cpu_module, cpu_native
from deqfuse.backends.maps import VARIANTS
from deqfuse.backends.reference import compute_dtype

# ---- forward -------------------------------------------------------------------------------------

GRID = [
    *(Case(variant=v, dtype=t) for v, t in itertools.product(VARIANTS, DTYPES)),
    *(Case(rows=r, dtype=t) for r, t in itertools.product(ROWS, ("f64", "f32")) if r != 17),
    *(Case(rows=5, dim=d, groups=g, dtype=t) for (d, g), t in itertools.product(SIZES, DTYPES)),
    *(Case(rows=9, n=n, variant=v) for n in (1, 3, 4, 5, 6) for v in ("paper", "released")),
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
                else:  # 16 bits round the start that the reference gets after the plain steps
                    steps = 4 if dtype == "f32" else None
                    assert_same_solution(solve, LOOSE, steps=steps, share=0.98)


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
    solver = solver.settled(rescue=False)
    seen = set()
    for solve in case.blocks(start=start).values():
        z, info, _ = solve(solver=solver, backend="cpu")
        expected, reference = as_compiled(solve, solver)
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
    solver = Anderson(m=2, max_iter=45, trace=True, rescue=False)
    for solve in Case(rows=70, dim=20, init="torch").blocks(start=True).values():
        z, info, _ = solve(solver=solver, backend="cpu")
        trace = info.trace.nan_to_num(torch.inf)
        assert torch.equal(info.residual, trace.amin(0))
        best_at, rows = trace.argmin(0) + 1, info.outcome != Outcome.CONVERGED
        assert (info.nfe - best_at)[rows].max() > solver.m
        for count in best_at[rows].unique().tolist()[:5]:
            short = dataclasses.replace(solver, max_iter=count)
            there = rows & (best_at == count)
            assert torch.equal(solve(solver=short, backend="cpu")[0][there], z[there])


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


# ---- instruction sets ----------------------------------------------------------------------------

PROGRAM = """
import json, sys, torch
from deqfuse import DEQFusion
from deqfuse.backends import cpu_native
torch.set_num_threads(1)
layer, xs, g = torch.load(sys.argv[1], weights_only=False)
z = layer(xs)
grads = torch.autograd.grad(z, [*xs, *layer.parameters()], g)
torch.save([z.detach(), *grads], sys.argv[2])
print(json.dumps(cpu_native.module.build_info()))
"""


@pytest.mark.parametrize("name", ["base", "avx2", "avx512", "vnni", "amx"])
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
    info = cpu_native.module.build_info()
    assert set(info) == {"compiler", "torch_target", "instruction_set", "vector_bytes"}
    widths = {"base": 16, "avx2": 32, "avx512": 64, "vnni": 64, "amx": 64}
    assert info["vector_bytes"] == widths[info["instruction_set"]]
    for rows, dim, itemsize in itertools.product((0, 1, 63, 64, 1000), (12, 500), (4, 8)):
        plan = cpu_native.module.plan(rows, dim, itemsize, 5)
        assert set(plan) == {"rows_per_tile", "tiles", "tile_bytes"}
        assert plan["rows_per_tile"] % (info["vector_bytes"] // itemsize) == 0
        assert (plan["tiles"] - 1) * plan["rows_per_tile"] < max(rows, 1)
        assert plan["tiles"] * plan["rows_per_tile"] >= rows
        assert plan["tile_bytes"] == (4 + 2 * 5) * dim * plan["rows_per_tile"] * itemsize


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
    monkeypatch.setattr(cpu_native, "module", None)
    monkeypatch.setattr(cpu_native, "load_error", "undefined symbol: of_doom")
    reason, remedy = cpu.unavailable()
    assert "undefined symbol: of_doom" in reason
    assert "--no-build-isolation" in remedy
    assert "DEQFUSE_BUILD=cpu" in remedy
    case = Case(dtype="f32")
    with pytest.raises(BackendUnavailable, match="of_doom"):
        case.layer(backend="cpu")(list(case.draw(2)))
    _, info = case.layer()(list(case.draw(2)), return_info=True)
    assert info.backend == "reference"


def test_a_file_that_is_missing_or_no_module_is_an_import_error(tmp_path: Path):
    library = tmp_path / "_cpu.so"
    with pytest.raises(ImportError, match=r"not built: there is no _cpu\.so"):
        cpu_module.Module(library)
    library.write_bytes(b"not a library")
    with pytest.raises(
        ImportError, match=r"_cpu\.so does not load: .*invalid ELF header|too short"
    ):
        cpu_module.Module(library)


def test_answers_come_in_the_compute_dtype():
    for dtype in DTYPES:
        z = Case(rows=3, dtype=dtype).blocks()["cells"](backend="cpu")[0]
        assert z.dtype == compute_dtype(DTYPES[dtype])
