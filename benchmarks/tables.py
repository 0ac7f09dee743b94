"""The Markdown tables of a report page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.results import Entry, Run
from benchmarks.timing import Spread, paired_ratio
from benchmarks.variants import OURS

RIVALS = ("torchdeq", "released", "compiled", "cuda-graph")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; numbers right, the first column left."""
    lines = list(rows)
    if not lines:
        return "Not measured in this run."
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def percent(share: float) -> str:
    """Never rounded up to 100%."""
    return "100%" if share == 1 else f"{min(100 * share, 99.99):.2f}%"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def ms(time: Spread) -> str:
    """Median and quartiles in milliseconds."""
    return f"{number(1e3 * time.median)} ({number(1e3 * time.low)}-{number(1e3 * time.high)})"


def ratio(entries: dict[str, Entry], rival: str, ours: str) -> str:
    """How many times as long a rival takes, with quartiles; a dash where it was not timed."""
    if rival not in entries or ours not in entries:
        return "-"
    r = paired_ratio(entries[rival].samples, entries[ours].samples)
    return f"**{number(r.median)}** ({number(r.low)}-{number(r.high)})"


def rivals(run: Run) -> list[str]:
    """Those that were measured."""
    measured = {e.variant for e in run.select("speed")}
    return [name for name in RIVALS if name in measured]


def sizes(entry: Entry) -> str:
    """(B, N, d)"""
    case = entry.facts["case"]
    return f"({case['rows']}, {case['modalities']}, {case['dim']})"


def flops(entry: Entry, quantity: str) -> float:
    """Products of the floor."""
    counted = entry.facts["flops"]
    if quantity == "step":
        return float(counted["forward"] + counted["backward"])
    return float(counted[quantity])


def floor_cells(run: Run, entry: Entry, quantity: str) -> list[str]:
    """Time of the products alone, and the share of the peak that the whole solve reaches."""
    floor = flops(entry, quantity) / run.peak
    share = floor / entry.time.median
    return [number(1e3 * floor), f"{share:.0%}" if share > 0.0995 else f"{share:.1%}"]


def speed_table(run: Run, regime: str, quantity: str) -> str:
    """Our time and its distance from the floor, and the ratios of the rivals."""
    names, rows, ours = rivals(run), [], run.ours
    header = ["case", "(B, N, d)", "n", "deqfuse ms", *(f"x {name}" for name in names)]
    header += {
        "tolerance": ["evaluations cells / fuse"],
        "equal-error": ["tol, deqfuse / torchdeq", "error, deqfuse / torchdeq"],
        "torch-init": ["rows solved, deqfuse / torchdeq / released"],
    }[regime] + ["floor ms", "share of peak"]
    for case in run.cases("speed", regime=regime, quantity=quantity):
        entries = run.by_variant("speed", case, regime=regime, quantity=quantity)
        if ours not in entries:
            continue
        own = entries[ours]
        row = [case, sizes(own), str(len(own.samples)), ms(own.time)]
        row += [ratio(entries, name, ours) for name in names]
        if regime == "tolerance":
            row.append(f"{own.facts['nfe_cells']:.1f} / {own.facts['nfe_fuse']:.1f}")
        elif regime == "equal-error":
            row.append(_each(entries, (ours, "torchdeq"), "tol", "{:g}"))
            row.append(_each(entries, (ours, "torchdeq"), "error", "{:.1e}"))
        else:
            row.append(_each(entries, (ours, "torchdeq", "released"), "solved", "{:.0%}"))
        rows.append([*row, *floor_cells(run, own, quantity)])
    return markdown(header, rows)


def _each(entries: dict[str, Entry], names: Sequence[str], fact: str, form: str) -> str:
    return " / ".join(
        form.format(entries[name].facts[fact]) if name in entries else "-" for name in names
    )


def times_table(run: Run, quantity: str) -> str:
    """Milliseconds of every variant at the cases' tolerance."""
    names = list(dict.fromkeys(e.variant for e in run.select("speed", regime="tolerance")))
    rows = []
    for case in run.cases("speed", regime="tolerance", quantity=quantity):
        entries = run.by_variant("speed", case, regime="tolerance", quantity=quantity)
        count = str(len(next(iter(entries.values())).samples))  # a turn visits every variant
        rows.append([case, count, *(ms(entries[n].time) if n in entries else "-" for n in names)])
    return markdown(["case", "n", *names], rows)


def backends_table(run: Run) -> str:
    """How far each of our backends is from its floor, forward and step."""
    rows = []
    for name in OURS:
        for quantity in ("forward", "step"):
            found = run.select("speed", regime="tolerance", quantity=quantity, variant=name)
            rows += [
                [
                    e.facts["case"]["name"],
                    name,
                    quantity,
                    ms(e.time),
                    *floor_cells(run, e, quantity),
                ]
                for e in found
            ]
    rows.sort(key=lambda row: run.cases("speed").index(row[0]))
    return markdown(["case", "variant", "of", "ms", "floor ms", "share of peak"], rows)


def origin_table(run: Run) -> str:
    """What the forward ratio over torchdeq is made of: the four factors multiply to it."""
    rows = []
    for case in run.cases("speed", regime="tolerance", quantity="forward"):
        entries = run.by_variant("speed", case, regime="tolerance", quantity="forward")
        if not {"torchdeq", run.ours} <= set(entries):
            continue
        own, rival = entries[run.ours], entries["torchdeq"]
        if "kernel_rate" not in own.facts:  # -k left out the fastest backend
            continue
        whole = paired_ratio(rival.samples, own.samples).median
        n = own.facts["case"]["modalities"]
        evaluations = (n * own.facts["nfe_cells"] + own.facts["nfe_fuse"]) / (n + 1)
        fewer = rival.facts["nfe_fuse"] / evaluations
        per_evaluation = flops(rival, "forward") / flops(own, "forward") / fewer
        kernel, linear = own.facts["kernel_rate"], rival.facts["linear_rate"]
        rest = whole / fewer / per_evaluation / (kernel / linear)
        factors = [number(f) for f in (whole, fewer, per_evaluation, kernel / linear, rest)]
        rows.append([case, *factors, f"{kernel / 1e9:.0f} / {linear / 1e9:.0f}"])
    header = ["case", "x torchdeq", "fewer evaluations", "fewer products in each"]
    return markdown([*header, "matmul engine", "the rest", "kernel / F.linear here, GF/s"], rows)


def memory_table(run: Run) -> str:
    """Peak over resting memory of a training step."""
    rows = []
    for case in run.cases("memory"):
        entries = run.by_variant("memory", case)
        own = entries.get(run.ours)
        for e in entries.values():
            times = "-" if own is None else number(e.facts["extra"] / own.facts["extra"])
            rows.append([case, e.variant, f"{e.facts['extra'] / 2**20:.0f}", times])
    text = markdown(["case", "variant", "peak - resting, MiB", "x deqfuse"], rows)
    for e in run.select("memory-steps"):
        counts = ", ".join(
            f"{extra / 2**20:.0f} MiB at {k:.0f}"
            for k, extra in zip(e.facts["steps"], e.facts["extra"], strict=True)
        )
        name = e.facts["case"]["name"]
        text += f"\n\nAgainst evaluations per row, tolerance out of reach ({name}): {counts}."
    return text


def overhead_table(run: Run) -> str:
    """Operators dispatched and values read back in one solve."""
    header = ["variant", "of", "operators", "scalar reads", "kernel launches", "synchronisations"]
    names = ("operators", "scalar_reads", "launches", "synchronisations")
    rows = [
        [e.variant, e.facts["quantity"], *(str(e.facts[name]) for name in names)]
        for e in run.select("overhead")
    ]
    return markdown(header, rows)


def scaling_table(run: Run) -> str:
    """Fitted slopes of time per evaluation, and the times."""
    rows = []
    for e in run.select("scaling"):
        points = ", ".join(
            f"{v:g}: {number(1e3 * s)}"
            for v, s in zip(e.facts["values"], e.facts["seconds"], strict=True)
        )
        fitted = "-" if e.facts["slope"] is None else f"{e.facts['slope']:.2f}"
        rows.append([str(e.facts["axis"]), e.variant, fitted, points])
    return markdown(["against", "variant", "slope of the last", "forward ms at each value"], rows)


def convergence_table(run: Run) -> str:
    """Evaluations to a tolerance per solver and initialisation."""
    rows = []
    for e in run.select("convergence"):
        for line in e.facts["table"]:
            counts = [f"{line[k]:.1f}" for k in ("cells", "fuse")]
            share = percent(line["share"])
            most = f"{line['most']:.0f}"
            rows.append([e.facts["init"], e.variant, f"{line['tol']:g}", share, *counts, most])
    header = ["init", "solver", "tol", "rows converged", "mean evaluations, cells"]
    return markdown([*header, "mean evaluations, fuse", "most of a row"], rows)


def refused_table(run: Run) -> str:
    """Variants that the gate found wrong."""
    found = run.raw["refused"]
    if not found:
        return "No variant was refused."
    keys = ("case", "regime", "variant", "reason")
    return markdown(keys, [[refusal[k] for k in keys] for refusal in found])
