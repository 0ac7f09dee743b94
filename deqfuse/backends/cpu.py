"""Whole solves and adjoints as compiled C++ on the CPU."""

from __future__ import annotations

from deqfuse.backends.problem import Problem


def unavailable() -> tuple[str, str] | None:
    """Why this backend cannot run here, and what would change that."""
    return (
        "this version of deqfuse has no compiled CPU kernels yet",
        "none in this version: solves on CPU tensors run on the reference backend",
    )


def refuses(problem: Problem) -> str | None:
    """Why this backend cannot take the problem."""
    return None if problem.device.type == "cpu" else f"it runs on CPU tensors, not {problem.device}"
