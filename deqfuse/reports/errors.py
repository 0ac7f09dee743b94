"""Mistakes of whoever called the command: shown as one line, never as a traceback."""

__all__ = ["UserError"]


class UserError(Exception):
    """The message goes to standard error, the exit code is 2."""
