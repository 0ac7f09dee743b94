"""Triton forward and C++/CUDA adjoint on NVIDIA GPUs."""

from __future__ import annotations

from deqfuse.backends.problem import Problem


def unavailable() -> tuple[str, str] | None:
    """Why this backend cannot run here, and what would change that."""
    return (
        "this version of deqfuse has no GPU kernels yet",
        "none in this version: solves on CUDA tensors run on the reference backend",
    )


def refuses(problem: Problem) -> str | None:
    """Why this backend cannot take the problem."""
    return (
        None if problem.device.type == "cuda" else f"it runs on CUDA tensors, not {problem.device}"
    )
