"""The report of the omics study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from deqfuse.data import MultiviewData
from deqfuse.experiments.absence import absence_section, absence_summary
from deqfuse.experiments.fusion_tables import (
    Groups,
    Metric,
    difference_table,
    on_test,
    score_table,
    solve_table,
    verdict,
)
from deqfuse.experiments.metrics import BINS, METRIC_NAMES
from deqfuse.experiments.mmdynamics import ABLATIONS, LABELS, SOLVED
from deqfuse.experiments.noise import noise_section, noise_summary
from deqfuse.experiments.statistics import describe, mean_error, numbers, paired
from deqfuse.experiments.study import Record, select
from deqfuse.reports import charts
from deqfuse.reports.charts import to_png
from deqfuse.reports.page import Picture, Report, Section, Table, file_name

__all__ = ["FILES", "build"]

CONVERGENCE = "Convergence through training"
FILES = (file_name(CONVERGENCE),)


METRICS = {name: Metric(header, 100.0, 1) for name, header in METRIC_NAMES.items()} | {
    "cross_entropy": Metric("cross-entropy", 1.0, 3),
    "ece": Metric("ECE %", 100.0, 1),
}


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
    known = groups["concat"][0].values["test"]
    metrics = {name: metric for name, metric in METRICS.items() if name in known}
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
    absent = [record for record in records if "absent" in record.params]
    if absent:
        seeds = len({record.params["seed"] for record in absent})
        how = f"Seeds: {seeds}. Learning rate and epoch are chosen as above."
        sections.insert(-1, absence_section(absent, LABELS, how))
        sections.insert(-1, noise_section(absent, LABELS))
    if ablations:
        table = _differences(groups, ablations, "deq", metrics)
        sections.insert(2, Section("Ablations: difference to DEQ Fusion", (), table))
    summary = {
        "test": {
            LABELS[fusion]: {metric: describe(on_test(group, metric)) for metric in metrics}
            for fusion, group in groups.items()
        },
        "processor_ms_per_epoch": {
            LABELS[fusion]: describe([r.values["processor_ms"] for r in group])
            for fusion, group in groups.items()
        },
    }
    if absent:
        summary["absent views"] = absence_summary(absent, LABELS)
        summary["noise"] = noise_summary(absent, LABELS)
    return Report(f"Omics: {settings['data']}", _lead(groups, settings), sections, summary)


def _lead(groups: Groups, settings: dict[str, Any]) -> str:
    """Whether DEQ Fusion is worse than what it replaces; the first line of the page."""
    ours, theirs = (on_test(groups[fusion], "accuracy") for fusion in ("deq", "concat"))
    return (
        f"On {settings['data']} DEQ Fusion {verdict(ours, theirs, 'accuracy')}. MM-Dynamics with "
        "other fusions in place of its concatenation, after arXiv 2306.16645, Section 4.1 and "
        "Table 1."
    )


def _reading(groups: Groups, main: Sequence[str]) -> tuple[str, ...]:
    """What the numbers say, in sentences that hold whatever they are."""
    lines = []
    for metric, better in (("accuracy", 1), ("cross_entropy", -1)):
        found: dict[int, list[str]] = {better: [], -better: [], 0: []}
        for fusion in main:
            result = paired(on_test(groups[fusion], metric), on_test(groups["concat"], metric))
            if fusion != "concat" and result is not None:
                found[result.sign].append(LABELS[fusion])
        words = {better: "Better", -better: "Worse", 0: "Undecided"}
        listed = ". ".join(
            f"{words[sign]}: {'; '.join(names) or 'none'}" for sign, names in found.items()
        )
        name = METRICS[metric].header.replace(" %", "").capitalize()
        lines.append(f"{name} against concatenation, decided beyond two standard errors. {listed}.")
    for fusion, control, text in (
        ("deq", "unit-norm", "the same sum with a GroupNorm and without an equilibrium"),
        ("deq", "paper", "the papers' equations"),
        ("pro", "base", "the late fusion that it starts from"),
    ):
        if fusion in groups and control in groups:
            ours, theirs = (on_test(groups[key], "accuracy") for key in (fusion, control))
            result = paired(ours, theirs, 100)
            if result is not None:
                lines.append(f"{LABELS[fusion]} against {text}, accuracy in points: {result}.")
    return tuple(lines)


def _scores(groups: Groups, main: Sequence[str], metrics: Mapping[str, Metric]) -> Table:
    seeds = len(groups["concat"])
    one = ", F1: of class 1, AUC: of its probability" if "f1" in metrics else ""
    note = (
        f"Test rows; mean ± standard error, seeds: {seeds}{one}. Cross-entropy in nats. ECE: "
        f"expected calibration error, {BINS} bins. GN(relu(x_f)): the weighted sum with ReLU and "
        "GroupNorm before the head, as at the end of DEQ Fusion, and no equilibrium; the control "
        "of the papers' equations has injections as they come, that of DEQ Fusion of unit size."
    )
    return score_table({fusion: groups[fusion] for fusion in main}, LABELS, metrics, note)


def _differences(
    groups: Groups, fusions: Sequence[str], baseline: str, metrics: Mapping[str, Metric]
) -> Table:
    note = (
        "seed by seed (same validation rows, same initial values of the "
        "shared parts): mean, and in brackets two standard errors to either side (for normal "
        "differences an interval of 92% with ten seeds, 88% with five, 82% with three). Points, "
        "cross-entropy in nats; of cross-entropy and ECE less is better. All seeds share the test "
        "rows, so the interval leaves out what other test rows would change."
    )
    return difference_table(groups, fusions, baseline, LABELS, metrics, note)


def _choices(groups: Groups, settings: dict[str, Any]) -> Table:
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


def _at_the_end(groups: Groups, settings: dict[str, Any]) -> str:
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


def _solves(groups: Groups) -> Table:
    note = (
        "Processor ms: time of the processor, one thread, of an epoch (one step on all training "
        "rows, every fifth with a look at the validation rows), over all learning rates; not the "
        "clock's, as other programs ran beside."
    )
    return solve_table(groups, LABELS, "processor_ms", 0, note)


def _curves(groups: Groups) -> Picture:
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
    groups: Groups, settings: dict[str, Any], learning: MultiviewData, test: MultiviewData
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
        "Pro-Fusion starts from a layer with ReLU on the concatenation and leads its output back "
        "to what the encoders take. The loss terms of the single views take encodings without "
        "that, which are computed separately, with dropout of their own; the costs of Pro-Fusion "
        "and of concatenation + layer include it.",
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
