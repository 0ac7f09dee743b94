"""What a solve is told and how it is cut into tiles: tables, no kernels, nothing that depends on B.

A tile is a few rows by whole groups of features, so that GroupNorm never leaves it. Triton's blocks
are powers of two: each group is padded to one in registers (75 channels take 128 columns), never in
memory, and the products' inner dimension is not padded beyond a block.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

FUSED_WIDTH = 128  # widest tile, in columns, that holds all features of a row and two weights
MAX_HISTORY = 5  # residuals that the whole-solve kernel keeps in registers
MAX_GROUP = 1024  # channels of a group, which one tile must hold
MAX_DIM = 1 << 15  # features: a weight's offsets take 31 bits, and so do the CUDA adjoint's
MAX_STEPS = 4096  # evaluations of a solve by steps: up to three launches each, wanted or not
MAX_STEP_HISTORY = 8  # and that the Anderson step combines
SHARED_BYTES = 166_912  # shared memory of a block on sm_80
REGISTERS = 65_536  # of a block on NVIDIA GPUs
TF32_TOL = 1e-4  # what solves with TF32 products reach; docs/explanation/kernels-gpu.md


class Knobs(NamedTuple):
    """What a solve is told."""

    tol: float
    max_iter: int
    m: int
    beta: float
    lam: float


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Columns:
    """Features as tile columns: ``groups`` groups of ``width`` channels, padded to ``padded``."""

    groups: int
    width: int

    @property
    def padded(self) -> int:
        return power_of_two(self.width)

    @property
    def whole(self) -> int:
        """Columns of a tile that holds every group; at least 16, which tensor cores ask for."""
        return max(power_of_two(self.groups) * self.padded, 16)


def columns(dim: int, num_groups: int) -> Columns:
    return Columns(num_groups, dim // num_groups)


@dataclass(frozen=True)
class Tile:
    """One program's share: ``rows`` rows by ``groups`` groups, inner dimension in blocks."""

    rows: int
    groups: int
    padded: int  # columns of a group
    inner: int
    warps: int
    stages: int
    registers: int | None = None  # per thread; without a limit ptxas may spill for occupancy

    @property
    def columns(self) -> int:
        return self.groups * self.padded


def whole_tile(cols: Columns) -> Tile:
    """All features of a row in one program, so that a step is one launch."""
    warps = 8 if cols.whole > 32 else 4
    return Tile(16, cols.whole // cols.padded, cols.padded, 32, warps, 2)


def solve_tile(cols: Columns, m: int, tensor_cores: bool) -> Tile:
    """A whole solve: rows, both weights and the history stay with one program.

    Without tensor cores a thread holds numbers of more rows, whose small solves take registers: a
    tile has fewer rows, and at full width more threads.
    """
    warps = 8 if cols.whole > 32 else 4
    rows = 16 if tensor_cores else 8
    registers = 128 if cols.whole <= 64 and m <= 3 else 255
    if cols.whole > 64 and not tensor_cores:
        warps, registers = 16, 128
    return Tile(rows, cols.whole // cols.padded, cols.padded, 32, warps, 1, registers)


def product_tile(cols: Columns, dtype: torch.dtype, vjp: bool) -> Tile:
    """Whole groups side by side up to 128 columns (64 in float64), or one wider group."""
    double = dtype == torch.float64
    groups = min(power_of_two(cols.groups), max((64 if double else 128) // cols.padded, 1))
    groups = max(groups, -(-16 // cols.padded))
    width = groups * cols.padded
    words = width * (2 if double else 1)
    # Ragged groups are loaded one number at a time, whose addresses take registers.
    rows = 32 if width <= 128 and cols.width == cols.padded and not double else 16
    if words > 512:  # the VJP's values of more rows would not fit a block's registers
        rows = 8 if words <= 1024 else 4
    # The weights' blocks in flight stay below 100 KB of shared memory. tl.dot takes blocks of at
    # least 16; of 1, products do without it.
    inner = 32 if words <= 256 else 16 if words <= 1024 else 1
    stages = 3 if words <= 512 else 2
    light = rows * width <= (1024 if vjp or double else 2048)
    warps = 4 if light else 8 if width <= 512 else 16
    return Tile(rows, groups, cols.padded, inner, warps, stages)


def fits_whole(dim: int, num_groups: int) -> bool:
    """Whether a program takes whole rows, or one launch per product is better."""
    return columns(dim, num_groups).whole <= FUSED_WIDTH


def fits_steps(dim: int, num_groups: int) -> bool:
    """Whether a tile can hold a group: no kernel takes wider ones."""
    return columns(dim, num_groups).width <= MAX_GROUP


def solve_bytes(dim: int, num_groups: int) -> int:
    """Shared memory of a whole solve: two weights, and a block of the gate constant's product."""
    width = columns(dim, num_groups).whole
    return 4 * (2 * width * width + 32 * (width + 16))


def fits_solve(
    dim: int, num_groups: int, dtype: torch.dtype, m: int, shared: int = SHARED_BYTES
) -> bool:
    """Whether the whole-solve kernels take the problem on a device with ``shared`` bytes a block.

    All widths fit on sm_80, sm_90 and sm_100. Two weights of 128 columns do not on sm_86, sm_89 and
    sm_120 (99 KB), nor on gfx942 (64 KB).
    """
    if dtype == torch.float64 or m > MAX_HISTORY or not fits_whole(dim, num_groups):
        return False
    return solve_bytes(dim, num_groups) <= shared


def step_tile(dim: int, num_groups: int, dtype: torch.dtype, vjp: bool = False) -> Tile:
    """The tile of a step kernel, or of its VJP, which holds more at once."""
    cols = columns(dim, num_groups)
    return whole_tile(cols) if fits_whole(dim, num_groups) else product_tile(cols, dtype, vjp)


def fuse_vjp_tile(dim: int, num_groups: int, dtype: torch.dtype, stored: torch.dtype) -> Tile:
    """The tile of the fuse step's VJP, with the registers per thread that it needs.

    Left alone, ptxas spills two numbers here for one more block on a multiprocessor. Weights
    ``stored`` in 16 bits pass through registers on their way to float32.
    """
    cols, tile = columns(dim, num_groups), step_tile(dim, num_groups, dtype, vjp=True)
    if dtype == torch.float64 or fits_whole(dim, num_groups):
        return tile
    ragged = cols.width != cols.padded
    many = stored.itemsize < dtype.itemsize or tile.columns > (128 if ragged else 256)
    most = REGISTERS // (32 * tile.warps)
    return dataclasses.replace(tile, registers=min(255 if many else 128, most))


def amd_options(options: dict[str, Any]) -> dict[str, Any]:
    """Launch options on AMD, whose blocks have 64 KB of shared memory; registers' limit is ptxas's.

    A third stage of wide groups' blocks would not fit, nor 16 rows of 4 KB; ``tl.dot`` takes 8.
    """
    options = {name: value for name, value in options.items() if name != "maxnreg"}
    if "C2" in options and options["C2"] * options["T"].primitive_bitwidth // 8 >= 4096:
        options["BK"] = min(options["BK"], 8)
    return options | {"num_stages": min(options["num_stages"], 2)}


def stages_of(first: int, last: int, dim: int, num_groups: int) -> list[tuple[int, int]]:
    """First and last stage of each launch of the stages ``first`` to ``last`` of a kernel."""
    if fits_whole(dim, num_groups):
        return [(first, last)]
    return [(stage, stage) for stage in range(first, last + 1)]
