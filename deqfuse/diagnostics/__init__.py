"""Measurements on a solved layer: Jacobian penalty and spectral radius."""

from deqfuse.diagnostics.jacobian import jacobian_penalty as jacobian_penalty
from deqfuse.diagnostics.jacobian import spectral_radius as spectral_radius

__all__ = ["jacobian_penalty", "spectral_radius"]
