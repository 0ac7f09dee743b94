"""The `deqfuse` command as it is installed: what takes minutes is announced at once.

This lies outside the package because importing the package loads torch, which takes over a second.
"""

import sys

__all__ = ["main"]

ANNOUNCED = {
    "demo": "Trains five fusions on handwritten numerals, three times each unless --seeds says "
    "otherwise, and writes a report. Takes about 2 minutes (--quick: seconds); Ctrl-C stops it.",
    "train": "Trains five fusions on your data, three times each unless --seeds says otherwise, "
    "and writes a report. Takes minutes (--quick: seconds); Ctrl-C stops it.",
}


def main() -> int:
    """Announce, then run the command line; the exit code is that of ``deqfuse.cli.main.main``."""
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else ""
    if command in ANNOUNCED and not {"-h", "--help"} & set(arguments):
        print(ANNOUNCED[command] + "\n", flush=True)
    from deqfuse.cli.main import main as run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
