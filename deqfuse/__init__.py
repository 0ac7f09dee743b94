"""Deep-equilibrium multimodal fusion for PyTorch: solved per row, differentiated implicitly.

The README is the start; docs/explanation has the mathematics and the architecture.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings

from deqfuse.errors import BackendUnavailable as BackendUnavailable
from deqfuse.errors import ConvergenceError as ConvergenceError
from deqfuse.errors import ConvergenceWarning as ConvergenceWarning
from deqfuse.errors import DoubleBackwardError as DoubleBackwardError
from deqfuse.nn.cells import PurifyCombine as PurifyCombine
from deqfuse.nn.cells import ResidualCell as ResidualCell
from deqfuse.nn.deq import DEQ as DEQ
from deqfuse.nn.fusion import DEQFusion as DEQFusion
from deqfuse.nn.presence import ModalityDropout as ModalityDropout
from deqfuse.nn.presence import present_from_nan as present_from_nan
from deqfuse.nn.progressive import ProFusion as ProFusion
from deqfuse.nn.warm import WarmStart as WarmStart
from deqfuse.outcome import Outcome as Outcome
from deqfuse.result import BlockInfo as BlockInfo
from deqfuse.result import SolveInfo as SolveInfo
from deqfuse.solvers.anderson import Anderson as Anderson
from deqfuse.solvers.anderson import Picard as Picard
from deqfuse.solvers.broyden import Broyden as Broyden
from deqfuse.solvers.newton_krylov import NewtonKrylov as NewtonKrylov
from deqfuse.solvers.options import Implicit as Implicit
from deqfuse.solvers.options import Neumann as Neumann
from deqfuse.solvers.options import OneStep as OneStep
from deqfuse.solvers.options import Unrolled as Unrolled

__all__ = [
    "DEQ",
    "Anderson",
    "BackendUnavailable",
    "BlockInfo",
    "Broyden",
    "ConvergenceError",
    "ConvergenceWarning",
    "DEQFusion",
    "DoubleBackwardError",
    "Implicit",
    "ModalityDropout",
    "Neumann",
    "NewtonKrylov",
    "OneStep",
    "Outcome",
    "Picard",
    "ProFusion",
    "PurifyCombine",
    "ResidualCell",
    "SolveInfo",
    "Unrolled",
    "WarmStart",
    "present_from_nan",
]

try:
    __version__ = importlib.metadata.version("deqfuse")
except importlib.metadata.PackageNotFoundError:
    __version__ = "0+unknown"

if importlib.util.find_spec("deqfuse.triton_kernels") is None:  # setup.py puts it there
    warnings.warn(
        f"deqfuse is imported from a bare checkout ({__path__[0]}) and is not installed: it runs, "
        "but without deqfuse.triton_kernels and compiled backends. Remedy: "
        "pip install --no-build-isolation -e . in the checkout.",
        stacklevel=2,
    )
