"""Multi-view data: the numerals shipped with the package, and a reader for the MOGONET layout.

Needs NumPy. ``import deqfuse`` does not import this package.
"""

from deqfuse.data.mogonet import load_mogonet as load_mogonet
from deqfuse.data.multiview import MultiviewData as MultiviewData
from deqfuse.data.multiview import Splits as Splits
from deqfuse.data.multiview import split_stratified as split_stratified
from deqfuse.data.numerals import load_numerals as load_numerals
from deqfuse.data.numerals import split_numerals as split_numerals
from deqfuse.data.tables import DataWarning as DataWarning

__all__ = [
    "DataWarning",
    "MultiviewData",
    "Splits",
    "load_mogonet",
    "load_numerals",
    "split_numerals",
    "split_stratified",
]
