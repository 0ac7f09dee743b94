"""Modules: they own parameters and hand them to ``deqfuse.functional``."""

from deqfuse.nn.cells import PurifyCombine as PurifyCombine
from deqfuse.nn.cells import ResidualCell as ResidualCell
from deqfuse.nn.deq import DEQ as DEQ
from deqfuse.nn.fusion import DEQFusion as DEQFusion
from deqfuse.nn.presence import ModalityDropout as ModalityDropout
from deqfuse.nn.presence import present_from_nan as present_from_nan
from deqfuse.nn.progressive import ProFusion as ProFusion
from deqfuse.nn.warm import WarmStart as WarmStart
from deqfuse.nn.with_info import WithInfo as WithInfo

__all__ = [
    "DEQ",
    "DEQFusion",
    "ModalityDropout",
    "ProFusion",
    "PurifyCombine",
    "ResidualCell",
    "WarmStart",
    "WithInfo",
    "present_from_nan",
]
