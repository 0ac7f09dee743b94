"""Command line of deqfuse: options, errors, exit codes. The work is done in ``commands.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import deqfuse
from deqfuse.cli.errors import UserError
from deqfuse.experiments.options import add_experiment

__all__ = ["main"]

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # what shells expect after Ctrl-C

_DESCRIPTION = """\
Deep-equilibrium multimodal fusion for PyTorch.

  deqfuse demo               train and compare fusions on real data, about 2 minutes
  deqfuse train --data DIR   the same on your own multi-view data
  deqfuse experiment NAME    the papers' experiments; minutes to hours
  deqfuse info               versions, devices, backends: what works here, what not and why
"""

_DEMO = """\
Train the same encoders and head with four fusions (concatenation, weighted sum, weight-tied steps
and DEQ Fusion) on handwritten numerals seen through six feature sets (UCI Multiple Features,
shipped with deqfuse), print a table, check the trained layer's gradients, and write a report that
opens in a browser.
"""

_TRAIN = """\
The comparison of `deqfuse demo` on your own data. DIR holds CSV files in MOGONET layout, for the
views i = 1, 2, ...:

  {i}_tr.csv  {i}_te.csv         training and test rows: one sample per line, numbers, no header row
  labels_tr.csv  labels_te.csv   one integer per line, in the order of the rows
  {i}_featname.csv               optional, one feature name per line

Validation rows are taken out of the training rows; the test rows serve for the final numbers only.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` when not given.

    Returns:
        The exit code: 0 done, 1 the gradient check failed, 2 a user's mistake, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    try:
        return _dispatch(options, arguments)
    except KeyboardInterrupt:
        kept = " Finished trials are kept." if options.command == "experiment" else ""
        sys.stderr.write(f"\ndeqfuse: interrupted, no report written.{kept}\n")
        return EXIT_INTERRUPTED
    except UserError as error:
        sys.stderr.write(f"deqfuse {options.command}: {error}\n")
        return EXIT_USER_ERROR


def _dispatch(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if options.command == "info":
        from deqfuse.info import main as info

        info()
        return 0
    try:
        from deqfuse.cli import commands  # pulls in matplotlib, numpy and rich
        from deqfuse.experiments import command
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("deqfuse"):
            raise
        raise UserError(
            f"needs the Python package {error.name}, which is not installed; the library itself "
            "does without. Remedy: pip install 'deqfuse[cli]' (in a checkout: "
            "pip install --no-build-isolation '.[cli]'), or "
            f"{sys.executable} -m pip install {error.name}"
        ) from error
    runs = {"demo": commands.demo, "train": commands.train, "experiment": command.experiment}
    return runs[options.command](options, arguments)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="deqfuse", description=_DESCRIPTION, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"deqfuse {deqfuse.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

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

    add_experiment(commands, _positive)

    commands.add_parser(
        "info", help="versions, devices, backends", description="Same as `python -m deqfuse.info`."
    )
    return parser


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


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
