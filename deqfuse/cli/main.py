"""Command line of deqfuse: which command, errors, exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from deqfuse.cli.options import parser
from deqfuse.reports.errors import UserError

__all__ = ["main"]

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # what shells expect after Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` when not given.

    Returns:
        The exit code: 0 done, 1 the gradient check failed, 2 a user's mistake, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(arguments)
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
        if options.command == "completion":
            import shtab

            print(shtab.complete(parser(), shell=options.shell))
            return 0
        from deqfuse.cli import commands, studies  # pulls in matplotlib, numpy and rich
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("deqfuse"):
            raise
        raise UserError(
            f"needs the Python package {error.name}, which is not installed; the library itself "
            "does without. Remedy: pip install 'deqfuse[cli]' (in a checkout: "
            "pip install --no-build-isolation '.[cli]'), or "
            f"{sys.executable} -m pip install {error.name}"
        ) from error
    runs = {"demo": commands.demo, "train": commands.train, "experiment": studies.experiment}
    return runs[options.command](options, arguments)
