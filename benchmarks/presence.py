"""What a mask saves: rows that lack modalities against the same rows with all of them.

    python -m benchmarks.presence --threads 2

Forward, training step and step with the Jacobian penalty at two sizes, with half of the entries
absent (one or two of three modalities in every other row, any of them), with a mask that is True
everywhere, and without one. All take turns; ratios over the call without a mask are paired.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DEVICE, Case, build
from benchmarks.tables import markdown, ms, number
from benchmarks.timing import PENALTY_WEIGHT, Call, Phases, interleave, now, paired_ratio, spread

CASES = (Case("serve", 4096, 3, 128), Case("small", 32, 3, 64))
QUANTITIES = ("forward", "step", "penalty")


def masks(case: Case) -> dict[str, Tensor | None]:
    """By name, (B, N) bool or None."""
    torch.manual_seed(case.seed)
    whole = torch.ones(case.rows, case.modalities, dtype=torch.bool, device=DEVICE)
    order = torch.rand(whole.shape, device=DEVICE).argsort(1)
    count = case.modalities // 2 + torch.arange(case.rows, device=DEVICE)[:, None] % 2
    return {"no mask": None, "all present": whole, "half absent": order < count}


def call_of(case: Case, quantity: str, present: Tensor | None, layer: Any, xs: Any) -> Call:
    """One of ``QUANTITIES``, with gradients of parameters and features but for the forward."""
    cotangent = torch.randn(case.rows, case.dim, device=DEVICE)

    def call() -> Phases:
        leaves = [*layer.parameters(), *xs]
        for leaf in leaves:
            leaf.grad = None
        start = now(cotangent.device)
        if quantity == "forward":
            with torch.no_grad():
                layer(xs, present=present)
            return (now(cotangent.device) - start,)
        z, info = layer(xs, present=present, return_info=True)
        outputs, grads = [z], [cotangent]
        if quantity == "penalty":
            outputs.append(info.jacobian_penalty())
            grads.append(torch.tensor(PENALTY_WEIGHT, device=DEVICE))
        torch.autograd.backward(outputs, grads)
        return (now(cotangent.device) - start,)

    return call


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=6.0, help="seconds for each line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for case in CASES:
        problem = build(case)
        found = masks(case)
        for quantity in QUANTITIES:
            calls = {
                name: call_of(case, quantity, present, problem.layer, problem.features)
                for name, present in found.items()
            }
            samples = interleave(calls, args.budget)
            seconds = {name: [sum(phases) for phases in own] for name, own in samples.items()}
            without = seconds.pop("no mask")
            row = [f"({case.rows}, {case.modalities}, {case.dim})", quantity, ms(spread(without))]
            rows.append(
                [*row, *(number(paired_ratio(s, without).median) for s in seconds.values())]
            )
    print(markdown(["(B, N, d)", "quantity", "no mask, ms", "all present", "half absent"], rows))


if __name__ == "__main__":
    main()
