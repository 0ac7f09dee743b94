"""The report of the omics study."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from deqfuse.data import MultiviewData
from deqfuse.experiments import absence
from deqfuse.experiments.metrics import METRIC_NAMES
from deqfuse.experiments.statistics import Paired, describe, numbers, paired, percent, versus
from deqfuse.experiments.study import Record, select
from deqfuse.reports import charts
from deqfuse.reports.charts import to_png
from deqfuse.reports.page import NOTHING, Picture, Report, Section, Table, file_name

__all__ = ["FILES", "build"]

LABELS = {
    "concat": "concatenation",
    "deq": "DEQ Fusion",
    "deq without dropout": "DEQ Fusion, no dropout in the fuse map",
    "released": "concatenation, trained as released",
    "deq released": "DEQ Fusion, trained as released",
}
COMPARED = ("concat", "deq")  # for every set of views
ACCURACY = "Test accuracy per set of views"
CONVERGENCE = "Convergence through training"
FILES = tuple(map(file_name, (ACCURACY, CONVERGENCE)))

# What MM-Dynamics reports with all views, known by rows and widths: a folder may have any name.
# ROSMAP: accuracy, F1, AUC, percent. Numbers of other data sets are not at hand.
REPORTED = {((245, 106), (200, 200, 200)): ("84.2", "84.6", "91.2")}


def build(
    records: Sequence[Record],
    settings: dict[str, Any],
    learning: MultiviewData,
    test: MultiviewData,
) -> Report:
    """Tables, pictures and numbers."""
    runs = [record for record in records if "views" in record.params]
    subsets = list(dict.fromkeys(tuple(record.params["views"]) for record in runs))
    groups = {
        (views, fusion): select(runs, views=list(views), fusion=fusion)
        for views in subsets
        for fusion in LABELS
    }
    pairs = {key: group for key, group in groups.items() if group}
    several = [views for views in subsets if len(views) > 1]
    metrics = [name for name in METRIC_NAMES if name in runs[0].values["test"]]
    timing = next(dict(record.values) for record in records if "timing" in record.params)
    sections = [
        Section(
            "Results",
            _reading(pairs, several, metrics, settings),
            _table(pairs, metrics, settings),
            _dots(pairs, several),
        ),
        Section("Difference, seed by seed", (), _differences(pairs, several, metrics)),
        Section(
            "Convergence through training",
            (_converged_text(runs),),
            picture=_curves(pairs, several),
        ),
        *_absent(records),
        Section("Time of a training step", (_timing_text(timing),), _timing(timing)),
        Section("What was done", _method(settings, learning, test)),
    ]
    summary = {
        "results": {
            f"views {_name(views)}, {LABELS[fusion]}": {
                metric: describe([r.values["test"][metric] for r in group]) for metric in metrics
            }
            for (views, fusion), group in pairs.items()
        },
        "train_rows_converged": {
            f"views {_name(views)}, {LABELS[fusion]}": describe(
                [r.values["train_converged"] for r in group]
            )
            for (views, fusion), group in pairs.items()
            if "train_converged" in group[0].values
        },
        "step_ms": timing["ms"],
        "absent views": absence.absence_summary(records, LABELS),
    }
    lead = (
        f"MM-Dynamics on {settings['data']}, its concatenation replaced by DEQ Fusion or not "
        "(arXiv 2306.16645, Section 4.1 and Table 1)."
    )
    return Report(f"Omics: {settings['data']}", lead, sections, summary)


def _absent(records: Sequence[Record]) -> list[Section]:
    """What becomes of the fusions when views are absent; nothing where there is one view only."""
    if not any("absent" in record.params for record in records):
        return []
    return [absence.absence_section(records, LABELS, "concat", "MM-Dynamics of all views.")]


def _reported(settings: dict[str, Any]) -> tuple[str, ...] | None:
    return REPORTED.get((tuple(settings["rows"]), tuple(settings["views"])))


_Pairs = dict[tuple[tuple[int, ...], str], list[Record]]


def _name(views: Sequence[int]) -> str:
    return "+".join(str(i + 1) for i in views)


def _scores(group: Sequence[Record], metric: str) -> list[float | None]:
    return [record.values["test"][metric] for record in group]


def _table(pairs: _Pairs, metrics: Sequence[str], settings: dict[str, Any]) -> Table:
    headers = (
        "views",
        "fusion",
        *(METRIC_NAMES[m] for m in metrics),
        "parameters",
        "cell / fuse steps",
        "converged, test",
        "converged, training",
        "ms/step",
    )
    rows: list[tuple[str, ...]] = []
    reported = _reported(settings) or ("not at hand",) * len(metrics)
    blank = (NOTHING,) * 5
    whole = _name(range(len(settings["views"])))
    rows.append((whole, "MM-Dynamics as published", *reported, *blank))
    for (views, fusion), group in pairs.items():
        rows.append(
            (
                _name(views),
                LABELS[fusion] if len(views) > 1 else "none",
                *(percent(_scores(group, m)) for m in metrics),
                f"{group[0].values['parameters']:,}",
                *_solves(group),
                f"{fmean(r.values['step_ms'] for r in group):.1f}",
            )
        )
    seeds = len(group)
    notes = (
        "Trained as released: all training rows, the last of all epochs, no validation rows. "
        f"Mean ± standard deviation over {seeds} seeds, all of them. Steps: evaluations per test "
        "row, median / maximum. Converged: rows whose every block reached the tolerance of 1e-4. "
        "ms/step: one process per core, so timings include each other's traffic.",
    )
    return Table(headers, tuple(rows), notes)


def _solves(group: Sequence[Record]) -> tuple[str, str, str]:
    tests = [record.values["test"] for record in group]
    if "fuse_nfe" not in tests[0]:
        return NOTHING, NOTHING, NOTHING
    steps = " / ".join(
        f"{fmean(t[key][0] for t in tests):.0f} ({max(t[key][1] for t in tests)})"
        for key in ("cells_nfe", "fuse_nfe")
    )
    train = fmean(record.values["train_converged"] for record in group)
    return steps, f"{100 * fmean(t['converged'] for t in tests):.2f}%", f"{100 * train:.3f}%"


def _differences(
    pairs: _Pairs, subsets: Sequence[tuple[int, ...]], metrics: Sequence[str]
) -> Table:
    rows = []
    for (views, fusion), group in pairs.items():
        if fusion == "concat" or len(views) == 1:
            continue
        cells = [
            versus(_scores(group, metric), _scores(pairs[views, "concat"], metric), 100)
            for metric in metrics
        ]
        rows.append((_name(views), LABELS[fusion], *cells))
    headers = ("views", "fusion", *map(_short, metrics))
    note = (
        "Minus concatenation in points, same seed (same initial values of the shared parts, and, "
        "but for the released training, same validation rows): mean ± standard error, and for how "
        "many seeds."
    )
    return Table(headers, tuple(rows), (note,))


def _reading(
    pairs: _Pairs,
    subsets: Sequence[tuple[int, ...]],
    metrics: Sequence[str],
    settings: dict[str, Any],
) -> tuple[str, ...]:
    """What the numbers say, in sentences that hold whatever they are."""
    counts = []
    for metric in metrics:
        signs = [
            result.sign
            for views in subsets
            if (result := _against(pairs, (views, "deq"), (views, "concat"), metric))
        ]
        counts.append(
            f"{_short(metric)}: better in {signs.count(1)}, worse in {signs.count(-1)}, "
            f"undecided in {signs.count(0)}"
        )
    lines = [
        f"DEQ Fusion against concatenation over the {len(subsets)} sets of views, decided where "
        f"the mean difference exceeds two standard errors: {'; '.join(counts)}."
    ]
    whole = max(subsets, key=len)
    compared = (
        ("deq without dropout", "deq", "Without dropout in the fuse map DEQ Fusion changes by"),
        ("deq without dropout", "concat", "Without it, it differs from concatenation by"),
        ("released", "concat", "MM-Dynamics trained as released differs from concatenation by"),
        (
            "deq released",
            "released",
            "DEQ Fusion in its place, trained likewise, differs from it by",
        ),
    )
    for ours, theirs, text in compared:
        if (whole, ours) in pairs:
            changes = ", ".join(
                f"{_short(m)} {_against(pairs, (whole, ours), (whole, theirs), m)}" for m in metrics
            )
            lines.append(f"{text} (points, views {_name(whole)}): {changes}.")
    if reported := _reported(settings):
        means = [fmean(numbers(_scores(pairs[whole, "released"], m), 100)) for m in metrics]
        lines.append(
            f"Published for MM-Dynamics: {' / '.join(reported)}; trained as released here: "
            f"{' / '.join(f'{m:.1f}' for m in means)} on average over the seeds."
        )
    for fusion in ("concat", "deq"):
        runs = [r.values for views in subsets for r in pairs[views, fusion]]
        lines.append(
            f"{LABELS[fusion]}: the epoch of best validation accuracy is "
            f"{fmean(v['chosen_epoch'] for v in runs):.0f} on average, training ended after "
            f"{fmean(v['epochs'] for v in runs):.0f}."
        )
    return tuple(lines)


def _against(
    pairs: _Pairs,
    ours: tuple[tuple[int, ...], str],
    theirs: tuple[tuple[int, ...], str],
    metric: str,
) -> Paired | None:
    return paired(_scores(pairs[ours], metric), _scores(pairs[theirs], metric), 100)


def _short(metric: str) -> str:
    return METRIC_NAMES[metric].replace(" %", "")


def _dots(pairs: _Pairs, subsets: Sequence[tuple[int, ...]]) -> Picture:
    series = {
        label: [numbers(_scores(pairs[views, fusion], "accuracy"), 100) for views in subsets]
        for fusion, label in ((fusion, LABELS[fusion]) for fusion in COMPARED)
    }
    figure = charts.dots("", "test accuracy, %", [f"views {_name(v)}" for v in subsets], series)
    return Picture(to_png(figure), ACCURACY, "Lines: mean over seeds. Dots: the seeds.")


def _curves(pairs: _Pairs, subsets: Sequence[tuple[int, ...]]) -> Picture:
    panels = []
    for key, title, ylabel, scale in (
        ("train_converged_curve", "Rows that converged", "share of rows, %", 100.0),
        ("train_fuse_nfe_curve", "Work of the fuse solve", "evaluations, mean over rows", 1.0),
    ):
        drawn = []
        for views in subsets:
            values = [[scale * v for v in r.values[key]] for r in pairs[views, "deq"]]
            steps = [100 * (i + 0.5) / len(values[0]) for i in range(len(values[0]))]
            drawn.append(charts.Line(f"views {_name(views)}", steps, values))
        panels.append(charts.Panel(title, "training done, %", ylabel, drawn))
    caption = (
        "DEQ Fusion with dropout in the fuse map, in training: mean over seeds, shaded from the "
        "lowest to the highest seed."
    )
    return Picture(to_png(charts.lines(panels, columns=2)), CONVERGENCE, caption)


def _converged_text(runs: Sequence[Record]) -> str:
    group = [record.values for record in runs if "train_converged" in record.values]
    worst = min(values["train_converged_worst_step"] for values in group)
    mean = fmean(values["train_converged"] for values in group)
    warnings = sum(values["convergence_warnings"] for values in group)
    curves = [values["train_converged_curve"] for values in group]
    begin = fmean(curve[0] for curve in curves)
    after = fmean(fmean(curve[1:] or curve) for curve in curves)
    return (
        f"Over all steps of all {len(group)} trainings {100 * mean:.4f}% of the rows reached the "
        f"tolerance in every block; the worst single step had {100 * worst:.1f}%. In the first "
        f"{100 / len(curves[0]):.0f}% of training it was {100 * begin:.1f}%, after that "
        f"{100 * after:.3f}%. Convergence warnings, forward and backward: {warnings}."
    )


def _timing_text(timing: dict[str, Any]) -> str:
    ms = timing["ms"]
    threads = max(int(name.split(", ")[1]) for name in ms)
    ratio = ms[f"reference, {threads}"] / ms[f"cpu, {threads}"]
    return (
        f"The same training step ({timing['rows']} rows, d = {timing['dim']}, all views, Jacobian "
        f"penalty and optimiser included) on either backend, taking turns: the reference needs "
        f"{ratio:.1f} times as long as the C++ path at {threads} threads. The penalty, a double "
        "VJP on the reference path for both, and the encoders are part of it."
    )


def _timing(timing: dict[str, Any]) -> Table:
    names = {
        "concat": "concatenation",
        "cpu": "DEQ Fusion, backend cpu",
        "reference": "DEQ Fusion, backend reference",
    }
    threads = sorted({int(name.split(", ")[1]) for name in timing["ms"]})
    rows = [
        (label, *(f"{timing['ms'][f'{key}, {t}']:.1f}" for t in threads))
        for key, label in names.items()
    ]
    headers = ("training step, ms", *(f"{t} thread{'s' if t > 1 else ''}" for t in threads))
    return Table(headers, tuple(rows), ())


def _method(
    settings: dict[str, Any], learning: MultiviewData, test: MultiviewData
) -> tuple[str, ...]:
    held = f"{100 * settings['validation']:.0f}%"
    return (
        f"Data: {learning.num_rows} training and {test.num_rows} test rows, views of "
        f"{', '.join(map(str, learning.widths))} features, {learning.num_classes} classes; every "
        "feature scaled to [0, 1] on the training rows.",
        f"MM-Dynamics: gates, true-class-probability confidences, encoders of width "
        f"{settings['dim']}, dropout {settings['dropout']:g}. DEQ Fusion has the paper's equations "
        "and the library's own initialisation, solver and tolerance. The paper's text asks for "
        "dropout in the fuse map and gives no rate; the block of its code has 0.2 by default, the "
        "branches that its code builds have none: both are run, 0.2 for every set of views. Both "
        "fusions are trained by the plain sum of the terms of the loss, as MM-Dynamics is; the "
        "code of DEQ Fusion for BRCA multiplies by 1.5 view after view (the fused term counts "
        "1.5^N), which is not done here.",
        f"Adam, learning rate {settings['learning_rate']:g}, weight decay "
        f"{settings['weight_decay']:g}, times {settings['decay_factor']:g} every "
        f"{settings['decay_every']} epochs, Jacobian weight {settings['jacobian_weight']:g}, "
        f"gradient norm clipped at {settings['clip_norm']:g}; {settings['epochs']} epochs of one "
        f"full-batch step, ended after {settings['patience']} epochs without a better one (the "
        "epochs as in the paper, the ending is ours; not where trained as released).",
        f"Each seed holds out {held} of the training rows, and the epoch of best validation "
        "accuracy (every "
        f"{settings['evaluate_every']} epochs, the validation loss deciding ties) is tested once. "
        "The code released with MM-Dynamics trains on all training rows and saves the last epoch; "
        "the rows trained as released do so too. The code of DEQ Fusion (BRCA) trains on all "
        "training rows and keeps the epoch of best *test* score.",
    )
