"""The options of the commands; what they mean is in ``commands.py`` and ``studies.py``."""

from __future__ import annotations

import argparse
import math

import deqfuse

__all__ = ["parser"]

_DESCRIPTION = """\
Deep-equilibrium multimodal fusion for PyTorch.

  deqfuse demo               train and compare fusions on real data, about 2 minutes
  deqfuse train --data DIR   the same on your own multi-view data
  deqfuse experiment NAME    the papers' experiments; minutes to hours
  deqfuse info               versions, devices, backends: what works here, what not and why
  deqfuse completion SHELL   completion of commands and options for bash, zsh or tcsh

`deqfuse COMMAND --help` explains a command and gives an example. The first to try:

  deqfuse demo --quick       everything once on a few rows, in seconds
"""

_DEMO = """\
Train the same encoders and head with five fusions (concatenation, weighted sum, progressive fusion,
weight-tied steps and DEQ Fusion) on handwritten numerals seen through six feature sets (UCI
Multiple Features, shipped with deqfuse), print a table, check the trained layer's gradients, and
write a report that opens in a browser. Takes about 2 minutes.

Example, a shorter run:

  deqfuse demo --seeds 1 --epochs 20 --out first-look
"""

_TRAIN = """\
The comparison of `deqfuse demo` on your own data. DIR holds CSV files in MOGONET layout, for the
views i = 1, 2, ...:

  {i}_tr.csv  {i}_te.csv         training and test rows: one sample per line, numbers, no header row
  labels_tr.csv  labels_te.csv   one integer per line, in the order of the rows
  {i}_featname.csv               optional, one feature name per line

A sample that lacks a view has an empty line, or empty cells only, in the view's table; fusions that
take a mask leave the view out, the others get the training mean in its place. With --ids every line
of the tables and of the labels starts with the id of its sample: views may then have other samples
in another order, and lack those that they do not list.

Validation rows are taken out of the training rows; the test rows serve for the final numbers only.

Example:

  deqfuse train --data two_views --out two-views-report
"""

_EXPERIMENT = """\
The experiments of the papers, on data that is at hand. Every finished trial is kept in the output
folder; after an interruption the same command goes on where it stopped. The epoch of a model is
chosen on validation rows, never on the test rows.

Examples:

  deqfuse experiment synthetic              progressive fusion's Appendix B.1
  deqfuse experiment numerals               fusions, ablations, robustness, probes (shipped data)
  deqfuse experiment omics --data DIR       MM-Dynamics with several fusions (MOGONET layout)
  deqfuse experiment stability --data DIR   what keeps training convergent (MOGONET layout)
  deqfuse experiment audiovisual --images DIR --audio DIR     digits seen and spoken
  deqfuse experiment finance --prices DIR                     stocks of a sector
  deqfuse experiment mmimdb --data multimodal_imdb.hdf5       posters and plots of movies
  deqfuse experiment mosi --data FILE.pkl                     sentiment of words and voice
"""

_INFO = """\
Versions, processor, devices, environment variables, and for every backend whether it runs here, or
why not and what would change that. Same as `python -m deqfuse.info`; belongs into a bug report.

Example:

  deqfuse info
"""

_COMPLETION = """\
Print a script with which a shell completes commands and options at the Tab key.

Examples:

  eval "$(deqfuse completion bash)"                     for this shell; in ~/.bashrc for all of them
  deqfuse completion zsh > "${fpath[1]}/_deqfuse"       zsh, where that folder is yours
"""
SHELLS = ("bash", "zsh", "tcsh")

_HELP = {
    "synthetic": "progressive fusion and DEQ Fusion on two dependent views (Appendix B.1)",
    "numerals": "all fusions and ablations on the handwritten numerals",
    "omics": "MM-Dynamics with concatenation, DEQ Fusion and what lies between",
    "stability": "penalties and other means that keep DEQ Fusion convergent in training",
    "audiovisual": "digits seen (MNIST format) and spoken (free-spoken-digit format)",
    "finance": "squared returns of stocks, sector by sector (Appendix C)",
    "mmimdb": "genres of movies from posters and plots (MM-IMDB in MultiBench's file)",
    "mosi": "sentiment from text and audio (CMU-MOSI in MultiBench's aligned pickle)",
}
_EXAMPLES = {
    "synthetic": "deqfuse experiment synthetic --jobs 2",
    "numerals": "deqfuse experiment numerals --seeds 5",
    "omics": "deqfuse experiment omics --data ROSMAP",
    "stability": "deqfuse experiment stability --data ROSMAP",
    "audiovisual": "deqfuse experiment audiovisual --images mnist --audio recordings",
    "finance": "deqfuse experiment finance --prices stocks --window 60",
    "mmimdb": "deqfuse experiment mmimdb --data multimodal_imdb.hdf5",
    "mosi": "deqfuse experiment mosi --data mosi_data.pkl",
}
_SEEDS = {
    "synthetic": 30,
    "numerals": 5,
    "omics": 10,
    "stability": 3,
    "audiovisual": 3,
    "finance": 3,
    "mmimdb": 3,
    "mosi": 5,
}
_FILES = {
    "mmimdb": "MultiBench's multimodal_imdb.hdf5; needs h5py (pip install 'deqfuse[mmimdb]')",
    "mosi": "MultiBench's aligned pickle; its arrays are read without running what it says",
}
_SEEDS_HELP = {"synthetic": "trials per setting"}


def parser() -> argparse.ArgumentParser:
    """The parser of ``deqfuse`` and its commands."""
    raw = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(
        prog="deqfuse", description=_DESCRIPTION, formatter_class=raw, allow_abbrev=False
    )
    whole.add_argument("--version", action="version", version=f"deqfuse {deqfuse.__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="compare fusions on the handwritten numerals",
        description=_DEMO,
        formatter_class=raw,
        allow_abbrev=False,
    )
    _add_common(demo, out="deqfuse-report")

    train = commands.add_parser(
        "train",
        help="compare fusions on your own data",
        description=_TRAIN,
        formatter_class=raw,
        allow_abbrev=False,
    )
    train.add_argument("--data", required=True, metavar="DIR", help="folder with the CSV files")
    train.add_argument(
        "--ids",
        action="store_true",
        help="the first cell of every line is the sample's id, by which views are joined",
    )
    _add_common(train, out="deqfuse-train-report")
    train.add_argument(
        "--validation",
        type=_fraction,
        default=0.25,
        metavar="SHARE",
        help="share of the training rows to validate on (default %(default)s)",
    )
    train.add_argument(
        "--split-seed",
        type=int,
        default=0,
        metavar="N",
        help="which rows those are (default %(default)s)",
    )

    _add_experiment(commands)

    commands.add_parser(
        "info", help="versions, devices, backends", description=_INFO, formatter_class=raw
    )
    completion = commands.add_parser(
        "completion",
        help="completion for a shell",
        description=_COMPLETION,
        formatter_class=raw,
    )
    completion.add_argument("shell", choices=SHELLS, help="for which shell")
    return whole


def _add_common(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument(
        "--out",
        default=out,
        metavar="DIR",
        help="folder for the report (default %(default)s); other people's files are left alone",
    )
    parser.add_argument(
        "--seeds",
        type=_positive,
        default=3,
        metavar="N",
        help="how often each fusion is trained (default %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=_positive,
        default=60,
        metavar="N",
        help="epochs per run (default %(default)s)",
    )
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu or cuda (default %(default)s)"
    )
    # Operations this small gain nothing from a second thread, and on a busy machine the threads'
    # waiting for each other makes an epoch ten times slower (measured on two cores).
    parser.add_argument(
        "--threads",
        type=_positive,
        default=1,
        metavar="N",
        help="CPU threads of torch (default %(default)s: the models are small)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rows, 2 epochs, 1 seed: does everything work?"
    )


def _add_experiment(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    experiment = commands.add_parser(
        "experiment",
        help="the papers' experiments",
        description=_EXPERIMENT,
        formatter_class=raw,
        allow_abbrev=False,
    )
    names = experiment.add_subparsers(dest="experiment", required=True, metavar="NAME")
    for name, text in _HELP.items():
        one = names.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.\n\nExample:\n\n  {_EXAMPLES[name]}",
            formatter_class=raw,
            allow_abbrev=False,
        )
        if name in ("omics", "stability"):
            one.add_argument(
                "--data", required=True, metavar="DIR", help="folder in MOGONET layout"
            )
        if name == "stability":
            one.add_argument(
                "--treatments",
                nargs="+",
                metavar="NAME",
                help="what is compared to 'none': 'jacobian 2' 'jacobian 20' 'jacobian 100' "
                "'radius 1' 'radius 10' 'norm one' 'norm drawn' rate gain (default: all)",
            )
            one.add_argument(
                "--layers",
                nargs="+",
                choices=("deq", "paper"),
                default=("deq", "paper"),
                help="the default layer, or the papers' equations (default: both)",
            )
        if name == "omics":
            one.add_argument(
                "--learning-rates",
                type=_positive_number,
                nargs="+",
                metavar="RATE",
                help="those that every fusion tries (default 1e-3 3e-3)",
            )
            one.add_argument(
                "--fusions",
                nargs="*",
                metavar="NAME",
                help="what is run besides concatenation and DEQ Fusion: weighted base pro norm "
                "unit-norm tied paper (the default), no-cell no-combine no-gate",
            )
            one.add_argument(
                "--robustness",
                action="store_true",
                help="also train each with and without modality dropout, and show how accuracy "
                "falls when views are absent or noisy",
            )
        if name == "finance":
            one.add_argument(
                "--prices",
                required=True,
                metavar="DIR",
                help="folder with open.csv (Date and a column of prices per stock) and sectors.csv "
                "(Ticker,Sector)",
            )
            one.add_argument(
                "--window",
                type=_positive,
                default=500,
                metavar="N",
                help="days that a model sees (default %(default)s, as in MultiBench)",
            )
        if name in _FILES:
            one.add_argument("--data", required=True, metavar="FILE", help=_FILES[name])
        if name == "audiovisual":
            one.add_argument(
                "--images",
                required=True,
                metavar="DIR",
                help="folder with the MNIST files (train-images-idx3-ubyte, ..., also .gz)",
            )
            one.add_argument(
                "--audio",
                required=True,
                metavar="DIR",
                help="folder with recordings named {digit}_{speaker}_{number}.wav",
            )
            one.add_argument(
                "--rows",
                nargs=3,
                type=_positive,
                default=(4000, 1000, 1000),
                metavar=("TRAIN", "VALIDATION", "TEST"),
                help="at most so many pairs to train, validate and test (default 4000 1000 1000)",
            )
        one.add_argument(
            "--out",
            default=f"deqfuse-{name}-report",
            metavar="DIR",
            help="folder for trials and report (default %(default)s)",
        )
        one.add_argument(
            "--seeds",
            type=_positive,
            default=_SEEDS[name],
            metavar="N",
            help=f"{_SEEDS_HELP.get(name, 'how often each model is trained')} "
            "(default %(default)s)",
        )
        one.add_argument(
            "--epochs",
            type=_positive,
            metavar="N",
            help="epochs per training (default: the study's own)",
        )
        one.add_argument(
            "--jobs",
            type=_positive,
            default=1,
            metavar="N",
            help="processes that run trials side by side (default %(default)s)",
        )
        one.add_argument(
            "--threads",
            type=_positive,
            default=1,
            metavar="N",
            help="CPU threads of torch in each process (default %(default)s)",
        )
        one.add_argument(
            "--quick", action="store_true", help="a few steps of everything: does it work?"
        )


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return value


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value
