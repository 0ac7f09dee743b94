"""Train a DEQ Fusion classifier with DDP or FSDP2, on CPU processes (gloo) or on GPUs (NCCL).

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py
    torchrun --standalone --nproc-per-node 8 examples/train_distributed.py --strategy fsdp

Nothing about the layer is special here: a solve has no communication in it, so ranks may iterate
for different lengths and meet where gradients are reduced. The table shows how different they are:
evaluations per row of each rank, and the busiest rank's share over the mean (1 = balanced).
Data: the handwritten numerals that ship with deqfuse, six views, rows divided among the ranks.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from deqfuse import DEQFusion, SolveInfo
from deqfuse.data import MultiviewData, split_numerals

DIM, PENALTY = 64, 0.1


class Classifier(nn.Module):
    """One encoder per view, DEQ Fusion, a linear head."""

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(w, DIM), nn.ReLU()) for w in widths)
        self.fusion = DEQFusion(DIM, len(widths))
        self.head = nn.Linear(DIM, num_classes)

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor, SolveInfo]:
        """Logits, Jacobian penalty, statistics.

        The penalty belongs inside: afterwards FSDP may have freed the parameters that it measures.
        """
        features = [encode(view) for encode, view in zip(self.encoders, views, strict=True)]
        z, info = self.fusion(features, return_info=True)
        penalty = info.jacobian_penalty() if torch.is_grad_enabled() else z.new_zeros(())
        return self.head(z), penalty, info


def wrap(model: nn.Module, strategy: str, device: torch.device) -> nn.Module:
    """The model as its ranks share it."""
    if strategy == "ddp":
        return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
    for encoder in model.encoders:  # type: ignore[union-attr]
        fully_shard(encoder)
    return fully_shard(model)  # the fusion layer is one unit: it reads its cells' parameters itself


def gathered(values: Sequence[float], device: torch.device) -> Tensor:
    """(ranks, values): what each rank has to tell."""
    mine = torch.tensor(values, dtype=torch.float64).to(device, torch.float32)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).cpu()


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, device: torch.device
) -> Tensor:  # (ranks, 5)
    """Sums of each rank: loss, batches, rows, evaluations, rows that did not converge."""
    model.train()
    sums = torch.zeros(5, device=device)
    for *views, labels in loader:
        views, labels = [v.to(device) for v in views], labels.to(device)
        logits, penalty, info = model(views)
        loss = F.cross_entropy(logits, labels) + PENALTY * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cells, fuse = info.cells.nfe.sum(), info.fuse.nfe.sum()
        failed = (~info.converged).sum()
        sums += torch.stack([loss.detach(), *torch.tensor([1, len(labels)]).to(sums),
                             (cells + fuse).to(sums), failed.to(sums)])  # fmt: skip
    return gathered(sums.tolist(), device)


@torch.no_grad()
def accuracy(model: nn.Module, data: MultiviewData, device: torch.device) -> float:
    """Of all rows; every rank classifies its share."""
    model.eval()
    share = slice(dist.get_rank(), None, dist.get_world_size())
    logits, _, _ = model([view[share].to(device) for view in data.views])
    right = (logits.argmax(1).cpu() == data.labels[share]).sum()
    return float(gathered([float(right)], device).sum()) / data.num_rows


def train(args: argparse.Namespace, device: torch.device) -> None:
    """The whole training; what it holds of the process group ends with it."""
    torch.manual_seed(0)  # the same start everywhere
    data = split_numerals()
    known = data.train
    model = wrap(Classifier(known.widths, known.num_classes).to(device), args.strategy, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    rows = TensorDataset(*known.views, known.labels)
    sampler: DistributedSampler = DistributedSampler(rows, seed=0)
    loader = DataLoader(rows, args.batch, sampler=sampler)
    first = dist.get_rank() == 0
    if first:
        print(f"{args.strategy}, {dist.get_world_size()} ranks on {device.type}, {len(rows)} rows")
        print("epoch   loss  accuracy  converged  busiest / mean  evaluations per row, by rank")
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        loss, batches, count, evaluations, failed = train_epoch(
            model, optimizer, loader, device
        ).unbind(1)
        right = accuracy(model, data.validation, device)
        if first:
            print(
                f"{epoch:5}  {(loss.sum() / batches.sum()).item():5.3f}  {right:8.1%}"
                f"  {1 - (failed.sum() / count.sum()).item():9.1%}"
                f"  {(evaluations.max() / evaluations.mean()).item():14.3f}  "
                + "  ".join(f"{n:.1f}" for n in (evaluations / count).tolist())
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=50, help="rows per rank and step")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc-per-node 2 " + __file__)

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train(args, device)
    dist.destroy_process_group()  # after the model: DDP must not be the last to hold the group


if __name__ == "__main__":
    main()
