"""What compiled kernels take, as the table of kernels-gpu-resources.md in docs/explanation.

Needs no Triton.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deqfuse.triton_kernels.tiles import SHARED_BYTES

SMALL_BYTES = 101_376  # of a block on sm_86, sm_89 and sm_120
# Shared memory that a block may have, in bytes (CUDA C++ programming guide; CDNA3's LDS).
SHARED = {
    "sm_80": SHARED_BYTES,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "gfx942": 65_536,
    "sm_86": SMALL_BYTES,
    "sm_89": SMALL_BYTES,
    "sm_120": SMALL_BYTES,
}

TRITON = "3.7.1"  # whose compiler and ptxas the page is about
HEADER = f"""# Registers, spills and shared memory of the GPU kernels

Generated with triton {TRITON}: `python -m deqfuse.triton_kernels.resources --set full --markdown`.
Read [kernels-gpu.md](kernels-gpu.md) first. In each cell: registers per thread / bytes spilled per
thread / bytes of shared memory per block, the most over a kernel's stages and variants (paper and
released, with and without dropout, warm start and damping; of the penalty's kernels only released,
with dropout). "Some absent": rows lack modalities. A dash: not launched there; steps are. For
sm_86, sm_89 and sm_120 only one size of each kind has been compiled.
"""

Row = tuple[str, str, str]  # kernel, width and history, arithmetic


def cells(entries: Iterable[dict[str, Any]]) -> dict[Row, dict[str, str]]:
    """By row and target: the most that any variant and stage takes."""
    most: dict[Row, dict[str, list[int]]] = {}
    for e in entries:
        plain = e["kind"] in ("anderson", "unit")  # neither groups nor products
        where = str(e["dim"]) if plain else f"{e['dim']} in {e['groups']}"
        history = f", m = {e['m']}" if e["kind"] in ("solve", "anderson") else ""
        history += ", some absent" if e["absent"] else ""
        arithmetic = e["dtype"] if plain else f"{e['dtype']} {e['precision']}"
        kernel = e["kernel"].strip("_").removesuffix("_kernel")
        row = most.setdefault((kernel, where + history, arithmetic), {})
        numbers = e["registers"], e["spilled"], e["shared"]
        row[e["target"]] = list(map(max, row.get(e["target"], [0, 0, 0]), numbers))
    return {
        key: {target: " / ".join(f"{n:,}" for n in numbers) for target, numbers in row.items()}
        for key, row in most.items()
    }


def markdown(entries: Iterable[dict[str, Any]], targets: Iterable[str]) -> str:
    """The whole page."""
    targets = list(targets)
    lines = [
        f"| kernel | features, groups | arithmetic | {' | '.join(targets)} |",
        "|---|---|---|" + "---:|" * len(targets),
    ]
    for key, row in cells(entries).items():
        lines.append("| " + " | ".join([*key, *(row.get(t, "-") for t in targets)]) + " |")
    return "\n".join([HEADER, *lines])


def documented(page: str) -> dict[Row, dict[str, str]]:
    """:func:`cells`, read from the page."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line[:2] == "| "]
    targets = lines[0][3:]
    return {
        (a, b, c): {t: cell for t, cell in zip(targets, rest, strict=True) if cell != "-"}
        for a, b, c, *rest in lines[1:]
    }
