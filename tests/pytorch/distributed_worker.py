"""One process of test_distributed.py, started by torchrun; writes what it found as JSON.

On CPUs with gloo, or each on a GPU of its own with NCCL.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from deqfuse import Anderson, DEQFusion, Implicit, SolveInfo, WarmStart

DIM, N, ROWS = 16, 3, 12


class Model(nn.Module):
    """An encoder per feature, the layer, a head."""

    def __init__(self, dtype: torch.dtype, warm: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        tol = 1e-13 if dtype == torch.float64 else 1e-6
        given = {"solver": Anderson(tol=tol, max_iter=300), "adjoint": Implicit(tol=tol),
                 "num_groups": 2, **options}  # fmt: skip
        self.encoders = nn.ModuleList(nn.Linear(6, DIM) for _ in range(N))
        fusion = DEQFusion(DIM, N, **given)
        self.fusion = WarmStart(fusion, ROWS) if warm else fusion
        self.head = nn.Linear(DIM, 4)
        self.to(dtype)

    def forward(self, x: Tensor, **given: Tensor) -> tuple[Tensor, SolveInfo]:  # (N, B, 6)
        features = [encode(view) for encode, view in zip(self.encoders, x, strict=True)]
        z, info = self.fusion(features, return_info=True, **given)
        return self.head(z), info


def wrapped(model: Model, strategy: str, keep_fusion: bool = False) -> nn.Module:
    if strategy == "ddp":
        return DistributedDataParallel(model)
    if strategy == "fsdp_of_layers":
        for part in model.encoders:
            fully_shard(part)  # reshards after forward: the backward gathers the parameters again
        fully_shard(model.fusion, reshard_after_forward=not keep_fusion)
    return fully_shard(model)


def named_gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}


def loss(
    model: nn.Module, x: Tensor, y: Tensor, rank: int, weight: float, given: dict[str, Tensor]
) -> Tensor:
    """Of the rows that a rank has, with its own probes for the Jacobian penalty."""
    logits, info = model(x, **given)
    total = (logits - y).square().mean()
    if weight == 0:
        return total
    torch.manual_seed(2 + rank)
    return total + weight * info.jacobian_penalty()


def gradient_error(
    strategy: str,
    dtype: torch.dtype,
    weight: float = 0.0,
    given: dict[str, Tensor] | None = None,
    **options: Any,
) -> float:
    """Largest relative difference to one process that sees all rows, over the parameters.

    ``given``: what the layer takes besides, a line per row. Warm starts: of the second epoch.
    """
    torch.manual_seed(1)
    x, y = torch.randn(N, ROWS, 6, dtype=dtype), torch.randn(ROWS, 4, dtype=dtype)
    rank, size = dist.get_rank(), dist.get_world_size()
    shares = [slice(r * ROWS // size, (r + 1) * ROWS // size) for r in range(size)]
    parts = [(x[:, s], y[s], {k: v[s] for k, v in (given or {}).items()}) for s in shares]
    alone = Model(dtype, **options)
    together = wrapped(Model(dtype, **options), strategy, keep_fusion=weight > 0)
    for _ in range(2 if options.get("warm") else 1):
        alone.zero_grad()
        together.zero_grad()
        for r, (of_x, of_y, of_given) in enumerate(parts):
            (loss(alone, of_x, of_y, r, weight, of_given) / size).backward()
        of_x, of_y, of_given = parts[rank]
        loss(together, of_x, of_y, rank, weight, of_given).backward()
    expected, given = named_gradients(alone), named_gradients(together)
    assert expected.keys() == given.keys()
    return max(((given[n] - g).norm() / g.norm()).item() for n, g in expected.items())


def uneven(strategy: str) -> dict[str, Any]:
    """Three steps in which rank 0 has few easy rows and the others many hard ones, or none."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    options = {"init": "torch", "on_failure": "ignore", "solver": Anderson(max_iter=200),
               "injection_norm": False}  # fmt: skip
    model = wrapped(Model(torch.float32, **options), strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    evaluations = []
    for rows in ((3, 40), (40, 3), (5, 0)):
        x = torch.randn(N, rows[min(rank, 1)], 6) * (100.0 if rank == 0 else 0.1)
        logits, info = model(x)
        optimizer.zero_grad()
        logits.square().sum().backward()
        optimizer.step()
        evaluations.append(int((info.fuse.nfe.sum() + info.cells.nfe.sum()).item()))
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {"evaluations": evaluations, "checksum": [p.double().sum().item() for p in whole]}


def sharded_cells() -> str:
    """What a user is told who shards the cells one by one."""
    model = Model(torch.float32)
    for cell in model.fusion.cells:
        fully_shard(cell)
    try:
        model(torch.randn(N, 2, 6))
    except TypeError as error:
        return str(error)
    return "nothing"


def measured_behind_the_forward() -> list[str]:
    """What a user is told who measures with parameters that were given back."""
    texts = []
    _, info = wrapped(Model(torch.float32), "fsdp_of_layers")(torch.randn(N, 2, 6))
    for measure in (info.jacobian_penalty, info.spectral_radius):
        try:
            measure()
            texts.append("nothing")
        except RuntimeError as error:
            texts.append(str(error))
    return texts


def compiled_error() -> float:
    """DDP around a compiled model, against the eager one on the same rows."""
    torch.manual_seed(1)
    x, found = torch.randn(N, 4, 6, dtype=torch.float64), []
    for compiled in (False, True):
        model = Model(torch.float64)
        if compiled:
            model.compile(backend="aot_eager", fullgraph=True)
        together = DistributedDataParallel(model)
        together(x)[0].square().mean().backward()
        found.append(torch.cat([g.flatten() for g in named_gradients(together).values()]))
    return ((found[1] - found[0]).norm() / found[0].norm()).item()


def main(folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    with torch.device(device):
        found = results()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def results() -> dict[str, Any]:
    found: dict[str, Any] = {}
    # No row of rank 0 has the first modality; those of rank 1 have different sets.
    patterns = torch.arange(ROWS)[:, None] % 7 + 1  # a bit per modality, at least one of them
    present = (patterns >> torch.arange(N) & 1).bool()
    present[: ROWS // 2] = torch.tensor([False, True, True])
    for strategy in ("ddp", "fsdp", "fsdp_of_layers"):
        for dtype in (torch.float32, torch.float64):
            for name, options in {
                "paper": {},
                "released": {"variant": "released"},
                "identity": {"cell": "identity"},
                "reference": {"backend": "reference"},
                "penalty": {"weight": 20.0},
                "penalty, reference": {"weight": 20.0, "backend": "reference"},
                "mask": {"weight": 20.0, "given": {"present": present}},
                "warm starts": {"warm": True, "given": {"rows": torch.arange(ROWS)}},
            }.items():
                key = f"{strategy} {str(dtype).removeprefix('torch.')} {name}"
                found[key] = gradient_error(strategy, dtype, **options)
        found[f"{strategy} uneven"] = uneven(strategy)
    found["sharded cells"] = sharded_cells()
    found["measured"] = measured_behind_the_forward()
    found["compiled"] = compiled_error()
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2])
