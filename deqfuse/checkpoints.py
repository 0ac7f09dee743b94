"""Key maps from the authors' released state dicts to this library's parameter names.

Three layouts are read: the repository's root module (also MM-IMDB; ``weights.i`` and ``bias``), and
BRCA, whose fused injection is the plain sum (no modality weights, no bias). Any prefix is removed.
CMU-MOSI uses another cell (1x1 Conv1d and BatchNorm) and is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_CELL = {"conv1": "linear1", "conv2": "linear2", "gn1": "norm1", "gn2": "norm2", "gn3": "norm3"}
_COMBINE = {"gate": "gate", "fuse": "fuse", "gn3": "norm"}
_BRANCH = re.compile(
    r"^(?P<prefix>.*?)func_\.branches\.(?P<branch>\d+)\.(?P<part>\w+)\.(?P<leaf>\w+)$"
)


def read_released(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes and renamed parameters of a released state dict.

    Returns:
        ``{"dim": d, "num_modalities": N}`` and a state dict for ``DEQFusion(...,
        variant="released")`` or ``"released-mmimdb"``.

    Raises:
        TypeError: not a mapping, a path for example.
        ValueError: not a DEQ Fusion state dict, CMU-MOSI's cell, or missing or unknown keys.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict: expected a mapping of names to tensors, got "
            f"{type(state_dict).__name__}. Remedy: torch.load(path), and from what it returns the "
            "state dict"
        )
    found = [(key, match) for key in state_dict if (match := _BRANCH.match(key))]
    if not found:
        raise ValueError(
            "state_dict: expected keys such as 'func_.branches.0.conv1.weight' (the authors' "
            f"released DEQ Fusion), got {sorted(state_dict)[:4]}..."
        )
    mosi = [
        key for key, m in found if state_dict[key].dim() == 3 or m["leaf"].startswith("running_")
    ]
    if mosi:
        raise ValueError(
            f"state_dict: {mosi[0]!r} belongs to the CMU-MOSI model, whose cell is a 1x1 Conv1d "
            "with BatchNorm, not a row-wise residual cell. Remedy: none; DEQFusion covers the "
            "root, BRCA and MM-IMDB models"
        )
    prefix = found[0][1]["prefix"]
    num_modalities = max(int(m["branch"]) for _, m in found)  # the last branch is the combination
    renamed = {}
    for key, match in found:
        branch = int(match["branch"])
        names, home = (
            (_COMBINE, "combine") if branch == num_modalities else (_CELL, f"cells.{branch}")
        )
        if match["part"] not in names or match["prefix"] != prefix:
            raise ValueError(f"state_dict: unknown key {key!r} for {num_modalities} modalities")
        renamed[f"{home}.{names[match['part']]}.{match['leaf']}"] = state_dict[key]
    wanted = [f"cells.{i}.{part}" for i in range(num_modalities) for part in _CELL.values()]
    wanted += [f"combine.{part}" for part in _COMBINE.values()]
    missing = {f"{part}.{leaf}" for part in wanted for leaf in ("weight", "bias")} - renamed.keys()
    if missing:
        raise ValueError(
            f"state_dict: the released keys of {sorted(missing)} are missing for {num_modalities} "
            "modalities"
        )
    like = renamed["combine.norm.weight"]
    start = f"{prefix}weights."
    expected = [f"{start}{i}" for i in range(num_modalities)]
    found_weights = sorted(key for key in state_dict if key.startswith(start))
    if found_weights and found_weights != sorted(expected):
        raise ValueError(
            f"state_dict: expected {num_modalities} keys '{start}i', got {len(found_weights)}: "
            f"{found_weights}"
        )
    given = [state_dict[key] for key in expected] if found_weights else []
    renamed["modality_weights"] = (
        torch.cat([w.reshape(1) for w in given]) if given else like.new_ones(num_modalities)
    )
    renamed["injection_bias"] = state_dict.get(f"{prefix}bias", like.new_zeros(1)).reshape(1)
    dim = renamed["combine.norm.weight"].shape[0]
    return {"dim": dim, "num_modalities": num_modalities}, renamed
