"""How many rows converge: of the default layer, with the papers' equations, at torch's init.

    python -m benchmarks.convergence_study --out convergence.md
    python -m benchmarks.convergence_study --study solvers --seeds 1 --threads 1

A row counts as converged in a block (one modality cell, or the fuse equation) when its relative
residual reached the tolerance within the budget. Shares are given for the worst block: rows of all
seeds are pooled per block and the block with the smallest share is shown. Every seed draws new
weights and new inputs.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tables import markdown, percent
from deqfuse import Anderson, Broyden, DEQFusion, NewtonKrylov, Picard, SolveInfo
from deqfuse.backends.maps import VariantName
from deqfuse.solvers.options import SolverOption

TOL = 1e-5
RESCUED = Anderson(tol=TOL, max_iter=50)
PLAIN = replace(RESCUED, rescue=False)
WIDTHS, SMALL_WIDTH, MODALITIES = (64, 300, 500), 16, (2, 3, 6)
SCALES = (0.01, 0.05, 0.3, 1.0, 3.0, 10.0)
# None: mixed, from 1 / sqrt(1000) to sqrt(1000), modality by modality.
NORMED_SCALES: tuple[float | None, ...] = (0.01, 0.05, 1.0, 100.0, None)
INPUTS = ("gaussian", "rectified")
TORCH_WIDTHS, TORCH_SCALES = (16, 64, 128, 300), (0.3, 1.0, 10.0)
GRID_ROWS, VARIANTS = 1024, ("paper", "released", "released-mmimdb")
ZERO_WIDTHS, ZERO_LAYERS = (64, 128, 256, 512), 12
REQUIRED_SHARE = 0.999


@dataclass(frozen=True)
class Case:
    """One layer and the inputs that it is fed with."""

    dim: int
    num_modalities: int
    inputs: str = "gaussian"  # or "rectified"; "missing": zeros in place of the first modality
    rms: float | None = 1.0
    rows: int = 256
    solver: SolverOption = PLAIN
    init: str = "contractive"
    injection_norm: bool = False
    variant: VariantName = "paper"
    dtype: torch.dtype = torch.float32


FIELDS = ("converged", "rescued", "residual", "nfe")


@dataclass(frozen=True)
class Tally:
    """Converged rows and residuals per block: the N cells, then the fuse equation."""

    converged: Tensor  # (N + 1, rows) bool
    rescued: Tensor  # (N + 1, rows) bool
    residual: Tensor  # (N + 1, rows)
    nfe: Tensor  # (N + 1, rows)
    seconds: float = field(default=0.0, compare=False)

    @classmethod
    def of(cls, info: SolveInfo, seconds: float) -> Tally:
        assert info.cells is not None
        pairs = [
            torch.cat([getattr(info.cells, name), getattr(info.fuse, name)[None]])
            for name in FIELDS
        ]
        return cls(*pairs, seconds=seconds)

    @classmethod
    def pooled(cls, tallies: Sequence[Tally]) -> Tally:
        """The rows of several seeds side by side."""
        joined = [torch.cat([getattr(t, name) for t in tallies], dim=1) for name in FIELDS]
        return cls(*joined, seconds=sum(t.seconds for t in tallies))

    @property
    def share(self) -> float:
        """Share of converged rows in the worst block."""
        return float(self.converged.double().mean(1).min())

    @property
    def share_of_cells(self) -> float:
        """Share of converged rows over all cells together."""
        return float(self.converged[:-1].double().mean())

    @property
    def share_of_fuse(self) -> float:
        return float(self.converged[-1].double().mean())

    @property
    def worst_residual(self) -> float:
        return float(self.residual.max())


def draw_inputs(case: Case) -> list[Tensor]:
    """N tensors (rows, dim) whose entries have root mean square ``case.rms``, or are missing.

    With ``rms`` None each modality has another, the last a thousand times the first's.
    """
    x = torch.randn(case.num_modalities, case.rows, case.dim)
    if case.inputs == "rectified":  # half of the mass is cut off: E relu(x)^2 = 1/2
        x = x.relu() * 2**0.5
    if case.inputs == "missing":
        x[0] = 0.0
    if case.rms is None:
        x = x * torch.logspace(-1.5, 1.5, case.num_modalities)[:, None, None]
    return list(x * (1.0 if case.rms is None else case.rms))


def measure(case: Case, seed: int) -> Tally:
    """Build the layer and its inputs from ``seed``, solve once, and count."""
    torch.manual_seed(seed)
    layer = DEQFusion(
        case.dim,
        case.num_modalities,
        init=case.init,
        injection_norm=case.injection_norm,
        variant=case.variant,
        solver=case.solver,
        on_failure="ignore",
    ).eval()
    layer, features = layer.to(case.dtype), [x.to(case.dtype) for x in draw_inputs(case)]
    start = time.perf_counter()
    with torch.no_grad():
        _, info = layer(features, return_info=True)
    return Tally.of(info, time.perf_counter() - start)


def measure_seeds(case: Case, seeds: Iterable[int]) -> Tally:
    """The rows of all seeds pooled."""
    return Tally.pooled([measure(case, seed) for seed in seeds])


# ---- tables --------------------------------------------------------------------------------------


def sweep_table(
    base: Case,
    widths: Sequence[int],
    scales: Sequence[float | None],
    seeds: Sequence[int],
    note: Callable[[str], None],
) -> tuple[str, list[tuple[Case, Tally]]]:
    """Share of rows (worst block) and worst residual, per width, N, kind of input and scale."""
    found: list[tuple[Case, Tally]] = []
    rows = []
    for dim, n, inputs in itertools.product(widths, MODALITIES, INPUTS):
        entries = []
        for rms in scales:
            case = replace(base, dim=dim, num_modalities=n, inputs=inputs, rms=rms)
            tally = measure_seeds(case, seeds)
            found.append((case, tally))
            most = int(tally.nfe.max())
            entries.append(f"{percent(tally.share)} · {tally.worst_residual:.1e} · {most}")
        rows.append([str(dim), str(n), inputs, *entries])
        note(" ".join(rows[-1]))
    header = ["d", "N", "inputs", *(_scale(rms) for rms in scales)]
    return markdown(header, rows), found


def _scale(rms: float | None) -> str:
    return "mixed" if rms is None else f"RMS {rms:g}"


def verdict(found: Sequence[tuple[Case, Tally]]) -> str:
    """One sentence: whether every case has the required share, and the worst of them."""
    case, worst = min(found, key=lambda pair: pair[1].share)
    below = sum(tally.share < REQUIRED_SHARE for _, tally in found)
    evaluations = max(int(tally.nfe.max()) for _, tally in found)
    state = "all reach" if not below else f"{below} stay below"
    return (
        f"{len(found)} cases, {state} {percent(REQUIRED_SHARE)} of rows in every block; lowest "
        f"share {percent(worst.share)} (d={case.dim}, N={case.num_modalities}, {case.inputs}, "
        f"{_scale(case.rms)}); most evaluations of a row {evaluations}."
    )


def contractive_study(seeds: Sequence[int], note: Callable[[str], None]) -> Iterator[str]:
    """At the default init: who converges to 1e-5 within 50 evaluations, in every block."""
    legend = "share of rows in the worst block · worst residual · most evaluations of a row"
    base = Case(dim=64, num_modalities=3)
    rescued = replace(base, solver=RESCUED)
    normed, small = replace(base, injection_norm=True), f"d = {SMALL_WIDTH} (groups of four)"
    papers = "The papers' equations (`injection_norm=False`)"
    studies: list[tuple[str, Case, tuple[int, ...], Sequence[float | None]]] = [
        ("Default layer, without rescue", normed, WIDTHS, NORMED_SCALES),
        (f"Default layer, {small}, without rescue", normed, (SMALL_WIDTH,), NORMED_SCALES),
        (f"{papers}, default init, without rescue", base, WIDTHS, SCALES),
        (f"{papers}, default init, {small}, without rescue", base, (SMALL_WIDTH,), SCALES),
        (f"{papers}, default init, {small}, with rescue", rescued, (SMALL_WIDTH,), SCALES),
    ]
    for title, case, widths, scales in studies:
        note(title)
        table, found = sweep_table(case, widths, scales, seeds, note)
        yield f"### {title}\n\n{legend}\n\n{table}\n\n{verdict(found)}"


def solver_study(seeds: Sequence[int], note: Callable[[str], None]) -> Iterator[str]:
    """torch's init, where the map is no contraction: which solver finds an equilibrium."""
    common = {"tol": TOL, "max_iter": 100}
    solvers = {
        "Picard": Picard(**common),
        "Anderson, no rescue": Anderson(**common, rescue=False),
        "Anderson": Anderson(**common),
        "Broyden": Broyden(**common),
        "Newton-Krylov": NewtonKrylov(**common),
        "Newton-Krylov, 400 evaluations": NewtonKrylov(tol=TOL, max_iter=400),
    }
    note("torch init")
    rows = []
    for name, solver in solvers.items():
        case = Case(dim=64, num_modalities=3, solver=solver, init="torch")
        tally = measure_seeds(case, seeds)
        rows.append(
            [
                name,
                percent(tally.share_of_cells),
                percent(tally.share_of_fuse),
                f"{tally.residual[:-1].median():.1e}",
                f"{tally.residual[-1].median():.1e}",
                f"{tally.nfe[:-1].double().mean():.0f}",
                f"{tally.nfe[-1].double().mean():.0f}",
                f"{int(tally.nfe.max())}",
                f"{tally.seconds:.1f} s",
            ]
        )
        note(" ".join(rows[-1]))
    header = [
        "solver", "cells", "fuse", "median residual, cells", "median residual, fuse",
        "mean evaluations, cells", "mean evaluations, fuse", "most", "time",
    ]  # fmt: skip
    yield (
        "### torch init, d = 64, N = 3, unit Gaussian inputs, tol 1e-5, 100 evaluations\n\n"
        "share of rows that converged; the rescue may go beyond the 100\n\n"
        f"{markdown(header, rows)}"
    )


def torch_grid_study(seeds: Sequence[int], note: Callable[[str], None]) -> Iterator[str]:
    """torch's init at every width and scale: what the solver leaves, and what the rescue does."""
    for variant, dtype in itertools.product(VARIANTS, (torch.float64, torch.float32)):
        title = f"torch init, {variant}, {str(dtype).removeprefix('torch.')}"
        note(title)
        rows, missed = [], 0
        for dim, n, inputs in itertools.product(TORCH_WIDTHS, MODALITIES, INPUTS):
            entries = []
            for rms in TORCH_SCALES:
                case = Case(
                    dim, n, inputs, rms, GRID_ROWS, RESCUED, "torch", variant=variant, dtype=dtype
                )
                tally = measure_seeds(case, seeds[:1])
                missed += tally.share < REQUIRED_SHARE
                rescued, lost = tally.rescued.double().mean(), int((~tally.converged).sum())
                work = tally.nfe[tally.rescued].double()
                median = int(work.median()) if len(work) else 0
                entries.append(
                    f"{percent(float(rescued))} · {lost} · {median} · {tally.seconds:.1f} s"
                )
            rows.append([str(dim), str(n), inputs, *entries])
            note(" ".join(rows[-1]))
        header = ["d", "N", "inputs", *(f"RMS {rms:g}" for rms in TORCH_SCALES)]
        yield (
            f"### {title}, tol 1e-5, {GRID_ROWS} rows\n\n"
            "share of rows of all blocks that the rescue solved · rows of all blocks that nothing "
            "solved · median of evaluations and Jacobians of a rescued row · time of the solve\n\n"
            f"{markdown(header, rows)}\n\n{missed} of {len(rows) * len(TORCH_SCALES)} cases "
            f"stay below {percent(REQUIRED_SHARE)} in some block."
        )


def zero_study(seeds: Sequence[int], note: Callable[[str], None]) -> Iterator[str]:
    """Zeros in place of a modality: its cell has the same problem in every row of a layer."""
    solvers = {
        "Anderson, no rescue": PLAIN,
        "Newton-Krylov, 400 evaluations": NewtonKrylov(tol=TOL, max_iter=400),
        "Anderson": RESCUED,
    }
    note("zeros in place of a modality")
    rows = []
    for dim in ZERO_WIDTHS:
        base = Case(dim=dim, num_modalities=2, inputs="missing", rows=1)
        tallies = [
            measure_seeds(replace(base, solver=s), range(ZERO_LAYERS)) for s in solvers.values()
        ]
        own = [f"{int(t.converged[0].sum())} of {ZERO_LAYERS}" for t in tallies]
        other = [int(t.converged[1:].sum()) for t in tallies]
        work = int(tallies[-1].nfe[0].double().median())
        rows.append([str(dim), *own, f"{other[-1]} of {2 * ZERO_LAYERS}", str(work)])
        note(" ".join(rows[-1]))
    header = ["d", *solvers, "other blocks, Anderson", "median work of that cell"]
    yield (
        f"### Default init, zeros in place of one of two modalities, {ZERO_LAYERS} layers\n\n"
        "layers whose cell of that modality converged; tol 1e-5, 50 evaluations where nothing else "
        f"is said, the rescue's on top\n\n{markdown(header, rows)}"
    )


def cost_study(seeds: Sequence[int], note: Callable[[str], None]) -> Iterator[str]:
    """What a rescue costs: a batch at torch's init, and single rows of wide layers."""
    rows = []
    case = Case(64, 3, rows=512, solver=RESCUED, init="torch", dtype=torch.float64)
    for name, solver in (("without", PLAIN), ("with", RESCUED)):
        tally = measure_seeds(replace(case, solver=solver), seeds[:1])
        left = int((tally.rescued | ~tally.converged).sum())
        rows.append([f"512 rows, d = 64, N = 3, {name}", str(left), f"{1e3 * tally.seconds:.0f}"])
    for dim in (300, 500):
        times = []
        for seed in range(ZERO_LAYERS * len(seeds)):
            tally = measure(Case(dim, 3, rows=1, solver=RESCUED, init="torch"), seed)
            if tally.rescued.any():
                times.append(1e3 * tally.seconds / int(tally.rescued.sum()))
        times.sort()
        middle = times[len(times) // 2] if times else float("nan")
        rows.append([f"a row of d = {dim}", str(len(times)), f"{middle:.0f} (median)"])
    yield f"### Cost\n\n{markdown(['what', 'rows that Anderson leaves', 'ms'], rows)}"


STUDIES = {
    "contractive": contractive_study,
    "solvers": solver_study,
    "torch": torch_grid_study,
    "zero": zero_study,
    "cost": cost_study,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=[*STUDIES, "all"], default="all")
    parser.add_argument("--seeds", type=int, default=4, help="layers per case, 256 rows each")
    parser.add_argument("--threads", type=int, help="torch threads; torch's own choice by default")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()

    def note(text: str) -> None:
        print(f"[{time.perf_counter() - start:6.0f} s] {text}", flush=True)

    parts = [
        f"## Convergence study\n\ntorch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"float32 on the CPU, {args.seeds} seeds of 256 rows per case."
    ]
    for name in STUDIES if args.study == "all" else [args.study]:
        parts += STUDIES[name](range(args.seeds), note)
    text = "\n\n".join(parts) + f"\n\n{time.perf_counter() - start:.0f} s in all.\n"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
