"""The Markdown tables of a report page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.cases import CASES
from benchmarks.results import Entry, Run
from benchmarks.timing import Spread, paired_ratio, spread
from benchmarks.variants import OURS

RIVALS = ("torchdeq", "released", "compiled", "cuda-graph")
# The quantities of the README's table, as they are called there.
HEADLINES = {"forward": "forward", "step": "step", "penalty": "step with penalty"}
# What is asked of the step with penalty, in these cases.
ASKED_OF = (
    "small", "small_128", "serve", "medium", "rosmap", "brca", "mmimdb", "wide",
)  # fmt: skip


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
    return _quartiles(paired_ratio(entries[rival].samples, entries[ours].samples))


def rivals(run: Run) -> list[str]:
    """Those that were measured."""
    measured = {e.variant for e in run.select("speed")}
    return [name for name in RIVALS if name in measured]


def headlines(run: Run) -> list[str]:
    """Those that were measured: saved runs of earlier commits have no penalty."""
    return [name for name in HEADLINES if run.select("speed", regime="tolerance", quantity=name)]


def sizes(entry: Entry) -> str:
    """(B, N, d)"""
    case = entry.facts["case"]
    return f"({case['rows']}, {case['modalities']}, {case['dim']})"


def flops(entry: Entry, quantity: str) -> float:
    """Products of the floor."""
    counted = entry.facts["flops"]
    if quantity in ("step", "penalty"):
        return float(sum(counted.values()))
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
    """How far each of our backends is from its floor, in every headline quantity."""
    rows = []
    for name in OURS:
        for quantity, of in HEADLINES.items():
            found = run.select("speed", regime="tolerance", quantity=quantity, variant=name)
            rows += [
                [
                    e.facts["case"]["name"],
                    name,
                    of,
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


class PenaltyCost(NamedTuple):
    """Of one case; all times that are compared are of the same turns."""

    without: Spread  # seconds of our step
    share: Spread  # of the penalty in our step with it
    before: Spread | None  # ratio over torchdeq, nobody with a penalty
    after: Spread | None  # ratio over torchdeq with its jac_reg
    kept: Spread | None  # the second ratio over the first


def penalty_cost(run: Run, case: str) -> PenaltyCost | None:
    """None where our step with penalty was not measured, ratios None where torchdeq's was not."""
    entries = run.by_variant("speed", case, quantity="penalty")
    if run.ours not in entries:
        return None
    own, without = entries[run.ours].samples, entries[run.ours].facts["without"]
    share = spread([1 - b / a for a, b in zip(own, without, strict=True)])
    if "torchdeq" not in entries:
        return PenaltyCost(spread(without), share, None, None, None)
    rival = entries["torchdeq"]
    before = [a / b for a, b in zip(rival.facts["without"], without, strict=True)]
    after = [a / b for a, b in zip(rival.samples, own, strict=True)]
    ratios = [spread(before), spread(after), paired_ratio(after, before)]
    return PenaltyCost(spread(without), share, *ratios)


def penalty_table(run: Run, cases: Sequence[str]) -> str:
    """What the Jacobian penalty costs a training step, here and in torchdeq."""
    rows = []
    for case in cases:
        if (cost := penalty_cost(run, case)) is None:
            continue
        own = run.by_variant("speed", case, quantity="penalty")[run.ours]
        row = [case, sizes(own), str(len(own.samples)), ms(cost.without), ms(own.time)]
        ratios = (cost.before, cost.after, cost.kept)
        row += [_percents(cost.share), *("-" if r is None else _quartiles(r) for r in ratios)]
        rows.append(row)
    header = ["case", "(B, N, d)", "n", "step ms", "with penalty ms", "share of the penalty"]
    header += ["x torchdeq, both without", "x torchdeq, both with penalty", "quotient"]
    return markdown(header, rows)


def penalty_missed(run: Run) -> list[str]:
    """What is asked of the penalty and not reached or not measured, a sentence each.

    A share of the step of at most 30% (35% below d = 256), and a ratio over torchdeq that is at
    least 0.9 of the one that both have without a penalty (0.85 up to d = 128).
    """
    missed = []
    for case in ASKED_OF:
        cost = penalty_cost(run, case)
        if cost is None or cost.kept is None:
            missed.append(f"{case}: not measured, or not against torchdeq.")
            continue
        dim = CASES[case].dim
        most, least = (0.3 if dim >= 256 else 0.35), (0.85 if dim <= 128 else 0.9)
        if cost.share.median > most:
            missed.append(f"{case}: share {cost.share.median:.1%}, at most {most:.0%} is asked.")
        if cost.kept.median < least:
            missed.append(f"{case}: quotient {cost.kept.median:.3f}, at least {least:g} is asked.")
    return missed


def _percents(share: Spread) -> str:
    return f"**{share.median:.0%}** ({share.low:.0%}-{share.high:.0%})"


def _quartiles(r: Spread) -> str:
    return f"**{number(r.median)}** ({number(r.low)}-{number(r.high)})"


def penalty_memory_table(run: Run) -> str:
    """Peak over resting memory of a training step without and with the penalty."""
    rows = []
    for e in run.select("penalty-memory"):
        without, extra = e.facts["without"], e.facts["extra"]
        mib = [f"{size / 2**20:.0f}" for size in (without, extra)]
        rows.append([e.facts["case"]["name"], e.variant, *mib, number(extra / without)])
    return markdown(["case", "variant", "step, MiB", "with penalty, MiB", "quotient"], rows)


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
