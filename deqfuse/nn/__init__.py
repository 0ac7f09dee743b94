"""Modules: they own parameters and hand them to ``deqfuse.functional``."""

from deqfuse.nn.cells import PurifyCombine as PurifyCombine
from deqfuse.nn.cells import ResidualCell as ResidualCell
from deqfuse.nn.deq import DEQ as DEQ
from deqfuse.nn.fusion import DEQFusion as DEQFusion
from deqfuse.nn.progressive import ProFusion as ProFusion
from deqfuse.nn.with_info import WithInfo as WithInfo

__all__ = ["DEQ", "DEQFusion", "ProFusion", "PurifyCombine", "ResidualCell", "WithInfo"]
