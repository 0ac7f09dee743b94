"""Problems that the tests under Triton's interpreter share, and what may be asked of them."""

from __future__ import annotations

import dataclasses
import functools
import os

import pytest
import torch
from parameters import scatter_norms
from torch import Tensor

from deqfuse import DEQFusion
from deqfuse.backends.maps import VARIANTS, CellParams, FuseParams
from deqfuse.backends.reference import compute_dtype

if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it once, when it is imported
    pytest.skip(
        "runs in a process of its own, under TRITON_INTERPRET=1: tests/triton/test_triton.py",
        allow_module_level=True,
    )

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}


@pytest.fixture
def poison():
    """Fresh memory holds NaN: a kernel that forgets an element cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclasses.dataclass(frozen=True)
class Case:
    """Random operands of one step; every parameter is away from zeros and ones."""

    rows: int = 17
    dim: int = 12
    groups: int = 2
    n: int = 2
    variant: str = "paper"
    dtype: str = "f64"
    mask: bool = False

    def __str__(self) -> str:
        fields = dataclasses.asdict(self).items()
        default = dataclasses.asdict(type(self)())
        return ",".join(f"{k}={v}" for k, v in fields if v != default[k]) or "default"

    def draw(self, *shape: int, stored: bool = True) -> Tensor:
        """Operands as stored; states and cotangents (``stored=False``) in the compute dtype."""
        dtype = DTYPES[self.dtype]
        values = torch.randn(*shape, self.rows, self.dim, dtype=torch.float64)
        return values.to(dtype if stored else compute_dtype(dtype))

    def _params(self, kinds: str) -> list[Tensor]:
        d = self.dim
        make = {
            "w": lambda: torch.randn(d, d) * d**-0.5,
            "b": lambda: torch.randn(d),
            "g": lambda: torch.rand(d) + 0.5,
        }
        return [make[kind]().to(DTYPES[self.dtype]) for kind in kinds]

    def cells(self) -> list[Tensor]:
        return self._params(self.n * "wbwbgbgbgb")

    def fuse(self) -> list[Tensor]:
        return self._params("wbwbgb")

    def drop(self) -> Tensor | None:
        return 2.0 * (self.draw() > 0).to(DTYPES[self.dtype]) if self.mask else None


@dataclasses.dataclass(frozen=True)
class SolveCase(Case):
    """A layer's operands, and its solves by a backend."""

    init: str = "contractive"
    start: bool = False

    def layer(self) -> DEQFusion:
        """Every parameter is away from its initial zeros and ones."""
        torch.manual_seed(1000 * self.dim + self.n)
        given = {"num_groups": self.groups, "variant": self.variant, "init": self.init}
        layer = DEQFusion(self.dim, self.n, **given).requires_grad_(False)
        scatter_norms(layer)
        return layer.to(self.draw(1).dtype)

    def solves(self, backend) -> list[functools.partial]:
        """Both solves, as functions of the solver."""
        layer = self.layer()
        x, cell_sum = self.draw(self.n), self.draw(stored=False)
        z0 = self.draw(self.n) if self.start else None
        flat = [t for part in layer.cells for t in part.flat()]
        rest = (self.groups, VARIANTS[self.variant])
        z0_fuse = None if z0 is None else z0[0]
        fuse = (x.sum(0), cell_sum, layer.combine.flat(), self.drop(), z0_fuse, self.n)
        return [
            functools.partial(backend.solve_cells, x, flat, z0, *rest),
            functools.partial(backend.solve_fuse, *fuse, *rest),
        ]

    def whole_layer(self, backend) -> functools.partial:
        """The layer's solve, as a function of the solver."""
        layer = self.layer()
        flat = [t for part in (*layer.cells, layer.combine) for t in part.flat()]
        flat.append(torch.rand(self.n).to(flat[0]) + 0.5)
        flat += [torch.tensor(0.3).to(flat[0])] if self.variant != "paper" else []
        z0 = self.draw(self.n) if self.start else None
        z0_fuse = None if z0 is None else z0[0]
        fixed = (flat, self.drop(), z0_fuse, z0, self.groups, VARIANTS[self.variant])
        return functools.partial(backend.solve_layer, list(self.draw(self.n)), *fixed)


_nudges: list[torch.Generator] = []  # where the last one's draws move what `upcast` is given


def upcast(value, dtype):
    """A tensor, a list of them or None in ``dtype``."""
    if isinstance(value, (list, tuple)):
        return type(value)(upcast(v, dtype) for v in value)
    if value is None or not _nudges:
        return None if value is None else value.to(dtype)
    draw = torch.rand(value.shape, dtype=torch.float64, generator=_nudges[-1]) - 0.5
    moved = value.double() * (1 + 4 * torch.finfo(torch.float32).eps * draw)
    return moved.float().to(dtype)


def error_nearby(reference, seed: int) -> list[Tensor]:
    """PyTorch's errors in float32 at operands that differ in their last two bits."""
    found = []
    for dtype in (torch.float32, torch.float64):
        _nudges.append(torch.Generator().manual_seed(seed))
        try:
            found.append(reference(dtype))
        finally:
            _nudges.pop()
    return [a - b for a, b in zip(*found, strict=True)]


def stacked(flat: list[Tensor]) -> CellParams:
    return CellParams.stack(flat)


def tupled(flat: list[Tensor]) -> FuseParams:
    return FuseParams(*flat)


def assert_as_good_as_torch(given, reference) -> None:
    """Each output errs at most 8 times as much as PyTorch in the same precision.

    ``reference(dtype)`` computes the outputs from the same operands in ``dtype``, which it takes
    through :func:`upcast`; float64 is the truth of float32. What remains of terms that cancel, as
    behind norms of two channels, PyTorch may have right by luck: its error is the largest at these
    operands and at three others that differ from them in their last bits. In float64 the same
    number of units in the last place is allowed. Sums in another order are as good, and one element
    in thousands may be unlucky, hence 8; an output that PyTorch has exactly may be off by one unit.
    """
    truth = reference(torch.float64)
    errors = [[a - b for a, b in zip(reference(torch.float32), truth, strict=True)]]
    errors += [error_nearby(reference, seed) for seed in range(3)]
    assert len(given) == len(truth)
    for i, (mine, wanted, *other) in enumerate(zip(given, truth, *errors, strict=True)):
        assert mine.shape == wanted.shape, i
        unit = torch.finfo(mine.dtype).eps
        scale = wanted.abs().max()
        units = max(t.abs().max() for t in other) / torch.finfo(torch.float32).eps
        error = (mine - wanted).abs().max()
        assert error <= 8 * unit * (units + scale / 8), (i, error / (unit * scale))
