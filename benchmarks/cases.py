"""The named cases, the sweeps, and one builder of weights, inputs and cotangents for all variants.

Sizes are those of the papers' own experiments where a name says so; ``mosi_rows`` has two groups
because 50 features do not divide by four. Weights, inputs and cotangent depend on the seed alone.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from deqfuse import DEQFusion

MAX_ITER, ADJOINT_MAX_ITER = 50, 60  # of every variant
PENALTY_WEIGHT = 20.0  # of the Jacobian penalty in the loss: the paper's
DEVICE = "cpu"  # of a whole run; `--device` of pytest sets it before anything is built


@dataclass(frozen=True)
class Case:
    """One problem: sizes, tolerance, initialisation."""

    name: str
    rows: int  # B
    modalities: int  # N
    dim: int  # d
    num_groups: int = 4
    tol: float = 1e-4
    m: int = 5  # Anderson's history in deqfuse; the others keep their own default, 6
    init: str = "contractive"
    seed: int = 0

    @property
    def sizes(self) -> str:
        return f"({self.rows}, {self.modalities}, {self.dim})"

    def at_torch_init(self) -> Case:
        """The same sizes where the map is not contractive: some rows are out of reach."""
        return dataclasses.replace(self, init="torch")


_ALL = (
    Case("small", 32, 3, 64),
    Case("small_128", 32, 2, 128),
    Case("serve", 4096, 2, 128),
    Case("medium", 128, 3, 256),
    Case("rosmap", 245, 3, 300),
    Case("brca", 612, 3, 500),
    Case("mmimdb", 256, 2, 512),
    Case("mmimdb_bert", 16, 2, 768),
    Case("mosi_rows", 1200, 2, 50, num_groups=2),
    Case("wide", 256, 3, 1024),
)
CASES = {case.name: case for case in _ALL}
# `make bench` times every named case at its tolerance, and these in the other regimes.
QUICK = ("small", "medium", "rosmap")

# One parameter varies, the rest is the base's.
SWEEPS = {
    "rows": [Case(f"rows_{b}", b, 2, 128) for b in (256, 512, 1024, 2048, 4096)],
    "dim": [Case(f"dim_{d}", 256, 2, d) for d in (128, 256, 512, 1024)],
    "modalities": [Case(f"modalities_{n}", 256, n, 256) for n in (1, 2, 3, 6)],
    "tol": [Case(f"tol_{t:g}", 128, 3, 256, tol=t) for t in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)],
    "m": [Case(f"m_{m}", 128, 3, 256, m=m) for m in (1, 2, 3, 5, 8)],
}


@dataclass(frozen=True)
class Problem:
    """A case with its weights and data. ``layer`` owns the weights that every variant uses."""

    case: Case
    layer: DEQFusion
    features: list[Tensor]  # N tensors (B, d)
    cotangent: Tensor  # (B, d); random, since a sum is constant under GroupNorm

    def double(self) -> Problem:
        """The same problem in float64."""
        return Problem(
            self.case,
            copy.deepcopy(self.layer).double(),
            [x.double() for x in self.features],
            self.cotangent.double(),
        )

    def leaves(self) -> dict[str, Tensor]:
        """All that a training step gives a gradient to, by name."""
        named: dict[str, Tensor] = dict(self.layer.named_parameters())
        return named | {f"features[{i}]": x for i, x in enumerate(self.features)}


def build(case: Case) -> Problem:
    """Weights, unit Gaussian inputs and a cotangent drawn from ``case.seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        layer = DEQFusion(
            case.dim,
            case.modalities,
            num_groups=case.num_groups,
            init=case.init,  # type: ignore[arg-type]
            injection_norm=False,  # the papers' equations, which all variants state
            on_failure="ignore",
        )
        drawn = torch.randn(case.modalities + 1, case.rows, case.dim)
    *features, cotangent = drawn.to(DEVICE).unbind(0)
    return Problem(
        case,
        layer.to(DEVICE),
        [x.clone().requires_grad_() for x in features],
        cotangent.clone(),
    )
