"""The report of the omics study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from deqfuse.data import MultiviewData
from deqfuse.experiments.metrics import BINS, METRIC_NAMES
from deqfuse.experiments.mmdynamics import ABLATIONS, LABELS, SOLVED
from deqfuse.experiments.statistics import describe, mean_error, numbers, paired
from deqfuse.experiments.study import Record, select
from deqfuse.experiments.training import BEGINNING
from deqfuse.reports import charts
from deqfuse.reports.charts import to_png
from deqfuse.reports.page import NOTHING, Picture, Report, Section, Table, file_name

__all__ = ["FILES", "build"]

CONVERGENCE = "Convergence through training"
FILES = (file_name(CONVERGENCE),)


class Metric(NamedTuple):
    """How a number of the test rows is shown."""

    header: str
    scale: float
    digits: int


METRICS = {name: Metric(header, 100.0, 1) for name, header in METRIC_NAMES.items()} | {
    "cross_entropy": Metric("cross-entropy", 1.0, 3),
    "ece": Metric("ECE %", 100.0, 1),
}

_Groups = Mapping[str, Sequence[Record]]  # fusion -> its trials, in the order of the seeds


def build(
    records: Sequence[Record],
    settings: dict[str, Any],
    learning: MultiviewData,
    test: MultiviewData,
) -> Report:
    """Tables, picture and numbers."""
    groups = {fusion: select(records, fusion=fusion) for fusion in LABELS}
    groups = {fusion: group for fusion, group in groups.items() if group}
    ablations = [fusion for fusion in ABLATIONS if fusion in groups]
    main = [fusion for fusion in groups if fusion not in ablations]
    metrics = [name for name in METRICS if name in groups["concat"][0].values["test"]]
    sections = [
        Section("Results", _reading(groups, main), _scores(groups, main, metrics)),
        Section(
            "Difference to concatenation",
            (),
            _differences(groups, [f for f in main if f != "concat"], "concat", metrics),
        ),
        Section("What was chosen", (_at_the_end(groups, settings),), _choices(groups, settings)),
        Section("Convergence and cost", (), _solves(groups), _curves(groups)),
        Section("What was done", _method(groups, settings, learning, test)),
    ]
    if ablations:
        table = _differences(groups, ablations, "deq", metrics)
        sections.insert(2, Section("Ablations: difference to DEQ Fusion", (), table))
    summary = {
        "test": {
            LABELS[fusion]: {metric: describe(_test(group, metric)) for metric in metrics}
            for fusion, group in groups.items()
        },
        "processor_ms_per_epoch": {
            LABELS[fusion]: describe([r.values["processor_ms"] for r in group])
            for fusion, group in groups.items()
        },
    }
    return Report(f"Omics: {settings['data']}", _lead(groups, settings), sections, summary)


def _test(group: Sequence[Record], metric: str) -> list[float | None]:
    return [record.values["test"][metric] for record in group]


def _lead(groups: _Groups, settings: dict[str, Any]) -> str:
    """Whether DEQ Fusion is worse than what it replaces; the first line of the page."""
    accuracy = {fusion: _test(groups[fusion], "accuracy") for fusion in ("deq", "concat")}
    result = paired(accuracy["deq"], accuracy["concat"], 100)
    seeds = len(groups["deq"])
    verdict = "cannot be compared with concatenation: an answer is not finite"
    if result is not None and result.error is None:
        verdict = f"differs from concatenation by {result.mean:+.1f} points of accuracy (one seed)"
    elif result is not None:
        place = {-1: "is below", 0: "is not below", 1: "is not below, but above,"}[result.sign]
        verdict = (
            f"{place} concatenation by more than two standard errors: the accuracies differ by "
            f"{result.mean:+.1f} ± {result.error:.1f} points (mean ± standard error, {seeds} seeds)"
        )
    return (
        f"On {settings['data']} DEQ Fusion {verdict}. MM-Dynamics with other fusions in place of "
        "its concatenation, after arXiv 2306.16645, Section 4.1 and Table 1."
    )


def _reading(groups: _Groups, main: Sequence[str]) -> tuple[str, ...]:
    """What the numbers say, in sentences that hold whatever they are."""
    lines = []
    for metric, better in (("accuracy", 1), ("cross_entropy", -1)):
        found: dict[int, list[str]] = {better: [], -better: [], 0: []}
        for fusion in main:
            result = paired(_test(groups[fusion], metric), _test(groups["concat"], metric))
            if fusion != "concat" and result is not None:
                found[result.sign].append(LABELS[fusion])
        words = {better: "Better", -better: "Worse", 0: "Undecided"}
        listed = ". ".join(
            f"{words[sign]}: {'; '.join(names) or 'none'}" for sign, names in found.items()
        )
        name = METRICS[metric].header.replace(" %", "").capitalize()
        lines.append(f"{name} against concatenation, decided beyond two standard errors. {listed}.")
    for control, text in (
        ("unit-norm", "the same sum with a GroupNorm and without an equilibrium"),
        ("paper", "the papers' equations"),
    ):
        if control in groups:
            result = paired(
                _test(groups["deq"], "accuracy"), _test(groups[control], "accuracy"), 100
            )
            if result is not None:
                lines.append(f"DEQ Fusion against {text}, accuracy in points: {result}.")
    return tuple(lines)


def _scores(groups: _Groups, main: Sequence[str], metrics: Sequence[str]) -> Table:
    rows = [
        (
            LABELS[fusion],
            *(
                mean_error(_test(groups[fusion], name), METRICS[name].digits, METRICS[name].scale)
                for name in metrics
            ),
            f"{groups[fusion][0].values['parameters']:,}",
        )
        for fusion in main
    ]
    headers = ("fusion", *(METRICS[name].header for name in metrics), "parameters")
    seeds = len(groups["concat"])
    one = ", F1: of class 1, AUC: of its probability" if "f1" in metrics else ""
    note = (
        f"Test rows; mean ± standard error, seeds: {seeds}{one}. Cross-entropy in nats. ECE: "
        f"expected calibration error, {BINS} bins. GN(relu(x_f)): the weighted sum with ReLU and "
        "GroupNorm before the head, as at the end of DEQ Fusion, and no equilibrium; the control "
        "of the papers' equations has injections as they come, that of DEQ Fusion of unit size."
    )
    return Table(headers, tuple(rows), (note,))


def _differences(
    groups: _Groups, fusions: Sequence[str], baseline: str, metrics: Sequence[str]
) -> Table:
    rows = []
    for fusion in fusions:
        cells = []
        for name in metrics:
            metric = METRICS[name]
            ours, theirs = _test(groups[fusion], name), _test(groups[baseline], name)
            result = paired(ours, theirs, metric.scale)
            cells.append(NOTHING if result is None else result.interval(metric.digits))
        rows.append((LABELS[fusion], *cells))
    headers = ("fusion", *(METRICS[name].header.replace(" %", "") for name in metrics))
    note = (
        f"Minus {LABELS[baseline]}, seed by seed (same validation rows, same initial values of the "
        "shared parts): mean, and in brackets two standard errors to either side (for normal "
        "differences an interval of 92% with ten seeds, 88% with five, 82% with three). Points, "
        "cross-entropy in nats; of cross-entropy and ECE less is better. All seeds share the test "
        "rows, so the interval leaves out what other test rows would change."
    )
    return Table(headers, tuple(rows), (note,))


def _choices(groups: _Groups, settings: dict[str, Any]) -> Table:
    rows = []
    for fusion, group in groups.items():
        chosen = [record.values["learning_rate"] for record in group]
        epochs = [record.values["chosen_epoch"] for record in group]
        loss = [record.values["validation_cross_entropy"] for record in group]
        rows.append(
            (
                LABELS[fusion],
                *(str(chosen.count(rate)) for rate in settings["learning_rate"]),
                f"{fmean(epochs):.0f} ({min(epochs)} to {max(epochs)})",
                mean_error(loss),
            )
        )
    headers = (
        "fusion",
        *(f"seeds with rate {rate:g}" for rate in settings["learning_rate"]),
        "epoch",
        "validation cross-entropy",
    )
    return Table(headers, tuple(rows), ("Epoch: mean, lowest and highest of the chosen ones.",))


def _at_the_end(groups: _Groups, settings: dict[str, Any]) -> str:
    """Whether more epochs or a higher rate could have done more."""
    epochs, highest = settings["epochs"], max(settings["learning_rate"])
    late = {
        fusion: sum(record.values["chosen_epoch"] == epochs for record in group)
        for fusion, group in groups.items()
    }
    named = "; ".join(f"{LABELS[fusion]} ({count})" for fusion, count in late.items() if count)
    total = sum(map(len, groups.values()))
    fast = sum(r.values["learning_rate"] == highest for group in groups.values() for r in group)
    return (
        f"The chosen epoch is the last one, {epochs}, so that more epochs could have done more, "
        f"for (number of seeds): {named or 'none'}. The highest rate was chosen in {fast} of "
        f"{total} cases; where it mostly is, a still higher one could have done more."
    )


def _solves(groups: _Groups) -> Table:
    rows = []
    for fusion, group in groups.items():
        milliseconds = mean_error([r.values["processor_ms"] for r in group], 0)
        cells: tuple[str, ...] = (NOTHING,) * 5
        if fusion in SOLVED:
            values, tests = [r.values for r in group], [r.values["test"] for r in group]
            steps = " / ".join(
                f"{fmean(t[key][0] for t in tests):.0f} ({max(t[key][1] for t in tests)})"
                for key in ("cells_nfe", "fuse_nfe")
                if key in tests[0]
            )
            cells = (
                steps,
                f"{100 * fmean(t['converged'] for t in tests):.2f}%",
                f"{100 * fmean(v['train_converged_settled'] for v in values):.3f}%",
                f"{100 * min(v['train_converged_worst_step'] for v in values):.1f}%",
                f"{100 * fmean(v['train_rescued'] for v in values):.1f}%",
            )
        rows.append((LABELS[fusion], milliseconds, *cells))
    beginning = f"{100 * BEGINNING:g}%"
    headers = (
        "fusion",
        "processor ms per epoch",
        "cell / fuse steps",
        "converged, test",
        f"training, after the first {beginning}",
        "worst step there",
        "rescued in training",
    )
    note = (
        "Processor ms: time of the processor, one thread, of an epoch (one step on all training "
        "rows, every fifth with a look at the validation rows), over all learning rates; not the "
        "clock's, as other programs ran beside. Steps: evaluations per test row, median (maximum). "
        "Converged: rows whose every block reached the tolerance of 1e-4. Worst step: the lowest "
        f"share of a single step after the first {beginning} of any training that was chosen. "
        "Rescued: rows that the iteration gave up and continuation solved, over all steps."
    )
    return Table(headers, tuple(rows), (note,))


def _curves(groups: _Groups) -> Picture:
    panels = []
    for key, title, ylabel, scale in (
        ("train_converged_curve", "Rows that converged", "share of rows, %", 100.0),
        ("train_fuse_nfe_curve", "Work of the fuse solve", "evaluations, mean over rows", 1.0),
    ):
        drawn = []
        for fusion in (fusion for fusion in SOLVED if fusion in groups):
            curves = [numbers(record.values[key], scale) for record in groups[fusion]]
            points = min(map(len, curves))  # short trainings have fewer
            steps = [100 * (i + 0.5) / points for i in range(points)]
            drawn.append(
                charts.Line(LABELS[fusion], steps, [_resampled(c, points) for c in curves])
            )
        panels.append(charts.Panel(title, "training done, %", ylabel, drawn))
    caption = "In training: mean over seeds, shaded from the lowest to the highest seed."
    return Picture(to_png(charts.lines(panels, columns=2)), CONVERGENCE, caption)


def _resampled(curve: Sequence[float], points: int) -> list[float]:
    return [curve[int((i + 0.5) * len(curve) / points)] for i in range(points)]


def _method(
    groups: _Groups, settings: dict[str, Any], learning: MultiviewData, test: MultiviewData
) -> tuple[str, ...]:
    rates = " and ".join(f"{rate:g}" for rate in settings["learning_rate"])
    trained = "; ".join(LABELS[fusion] for fusion in groups)
    return (
        f"Trained (seeds each: {len(groups['deq'])}): {trained}.",
        f"Data: {learning.num_rows} training and {test.num_rows} test rows, views of "
        f"{', '.join(map(str, learning.widths))} features, {learning.num_classes} classes; every "
        "feature scaled to [0, 1] on the training rows.",
        f"MM-Dynamics: gates, true-class-probability confidences, encoders of width "
        f"{settings['dim']}, dropout {settings['dropout']:g}, the plain sum of its loss terms. "
        "DEQ Fusion has the library's own initialisation, solver and tolerance, and no dropout in "
        "its fuse map. It divides every injection by its root mean square, so that of a confidence "
        "only the sign enters; the papers' equations take injections as they come.",
        f"Every fusion has the same budget: learning rates {rates}, Adam, weight decay "
        f"{settings['weight_decay']:g}, gradient norm clipped at {settings['clip_norm']:g}, "
        f"{settings['epochs']} epochs of one full-batch step at most, ended after "
        f"{settings['patience']} epochs without a better one; Jacobian weight "
        f"{settings['jacobian_weight']:g} where there is an equilibrium.",
        f"Each seed holds out {100 * settings['validation']:.0f}% of the training rows. The epoch "
        f"(every {settings['evaluate_every']} epochs) and the learning rate of lowest "
        "cross-entropy on them are chosen, and this one model is tested once. Test rows decide "
        "nothing.",
        "The authors of DEQ Fusion train at 1e-4 for 1000 epochs, where concatenation learns "
        "slowly, and their code for BRCA keeps the epoch of best *test* score.",
        "To repeat: `python -m tools.convert_tcga wheels data` makes the cohorts of TCGA out of "
        "public wheels (its head says which, and under which licence; ROSMAP comes from "
        "github.com/txWang/MOGONET as it is), and the command below runs the study.",
    )
