"""The options of ``deqfuse experiment``; what they mean to a study is in ``command.py``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

__all__ = ["add_experiment"]

_DESCRIPTION = """\
The experiments of the papers, on data that is at hand. Every finished trial is kept in the output
folder; after an interruption the same command goes on where it stopped. The epoch of a model is
chosen on validation rows, never on the test rows.

  deqfuse experiment synthetic              progressive fusion's Appendix B.1
  deqfuse experiment numerals               fusions, ablations, robustness, probes (shipped data)
  deqfuse experiment omics --data DIR       MM-Dynamics with and without DEQ Fusion (MOGONET layout)
  deqfuse experiment audiovisual --images DIR --audio DIR     digits seen and spoken
"""

_HELP = {
    "synthetic": "progressive fusion and DEQ Fusion on two dependent views (Appendix B.1)",
    "numerals": "all fusions and ablations on the handwritten numerals",
    "omics": "MM-Dynamics with concatenation against DEQ Fusion",
    "audiovisual": "digits seen (MNIST format) and spoken (free-spoken-digit format)",
}
_SEEDS = {"synthetic": 30, "numerals": 5, "omics": 10, "audiovisual": 3}
_SEEDS_HELP = {"synthetic": "trials per setting"}


def add_experiment(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    positive: Callable[[str], int],
) -> None:
    """Add the command to the parser of ``deqfuse``.

    Args:
        commands: where commands are added.
        positive: reads a whole number >= 1.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "experiment",
        help="the papers' experiments",
        description=_DESCRIPTION,
        formatter_class=raw,
        allow_abbrev=False,
    )
    names = parser.add_subparsers(dest="experiment", required=True, metavar="NAME")
    for name, text in _HELP.items():
        one = names.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == "omics":
            one.add_argument(
                "--data", required=True, metavar="DIR", help="folder in MOGONET layout"
            )
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
            "--out",
            default=f"deqfuse-{name}-report",
            metavar="DIR",
            help="folder for trials and report (default %(default)s)",
        )
        one.add_argument(
            "--seeds",
            type=positive,
            default=_SEEDS[name],
            metavar="N",
            help=f"{_SEEDS_HELP.get(name, 'how often each model is trained')} "
            "(default %(default)s)",
        )
        one.add_argument(
            "--epochs",
            type=positive,
            metavar="N",
            help="epochs per training (default: the study's own)",
        )
        one.add_argument(
            "--jobs",
            type=positive,
            default=1,
            metavar="N",
            help="processes that run trials side by side (default %(default)s)",
        )
        one.add_argument(
            "--threads",
            type=positive,
            default=1,
            metavar="N",
            help="CPU threads of torch in each process (default %(default)s)",
        )
        one.add_argument(
            "--quick", action="store_true", help="a few steps of everything: does it work?"
        )
