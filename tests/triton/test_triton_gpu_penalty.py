"""The Jacobian penalty's kernels on a GPU: values, gradients, batches, synchronisation.

Not run on one yet. Under TRITON_INTERPRET=1 they are rehearsed on the CPU; see gpu_cases.
"""

from __future__ import annotations

import pytest
import torch
from gpu_cases import (
    CELLS,
    DEVICE,
    DTYPES,
    MARK,
    NAMES,
    PATHS,
    REPEATS,
    ROWS,
    WIDTHS,
    assert_as_good_as_torch,
    in_float64,
    layer_of,
    no_synchronisation,
    rehearsal,  # noqa: F401 - a fixture
    rows_off_kinks,
    synchronize,
)
from torch import Tensor

from deqfuse.backends import cuda, maps, reference
from deqfuse.backends.layer import LayerParams, fuse_injection
from deqfuse.backends.maps import PAPER, CellParams, FuseParams

pytestmark = MARK


def operands(dim: int, groups: int, dtype: str) -> list:
    """Two probes, states, injections, parameters and a mask; no number near a relu's kink."""
    stored = DTYPES[dtype]
    layer = layer_of(dim, groups, CELLS, stored)
    params = [t for part in (*layer.cells, layer.combine) for t in part.flat()]
    params.append(layer.modality_weights)
    x = torch.randn(CELLS, ROWS, dim).to(DEVICE, stored)
    states, *probes = torch.randn(3, CELLS + 1, ROWS, dim).to(
        DEVICE, reference.compute_dtype(stored)
    )
    mask = (2.0 * (torch.rand(ROWS, dim) > 0.5)).to(x)

    def exact() -> None:
        x_, z, m, flat = (in_float64(t) for t in (x, states, mask, params))
        parts = LayerParams.split(flat, CELLS)
        maps.residual_cell(z[:-1], x_, CellParams.stack(parts.cells), groups)
        fuse, x_fuse = FuseParams(*parts.fuse), fuse_injection(x_, parts.weights, None)
        constant = maps.gate_constant(z[:-1].sum(0), CELLS, fuse)
        maps.purify_combine(z[-1], x_fuse, constant, m, CELLS, fuse, groups)

    off = rows_off_kinks(exact, 1e-5)
    return [torch.stack(probes)[:, :, off], states[:, off], list(x[:, off]), params, mask[off]]


def flat(answer: tuple[Tensor, list[Tensor], list[Tensor]]) -> list[Tensor]:
    return [answer[0], *answer[1], *answer[2]]


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(("dim", "groups"), WIDTHS)
def test_values_and_gradients(dim, groups, dtype):
    given = operands(dim, groups, dtype)

    def expected(kind):
        cast = [
            [t.to(kind) for t in v] if isinstance(v, list) else v.to(kind) for v in given
        ]  # fmt: skip
        return flat(reference.BACKEND.penalty(*cast, groups, PAPER, True))

    assert_as_good_as_torch(flat(cuda.BACKEND.penalty(*given, groups, PAPER, True)), expected)


@PATHS
def test_batches_and_repeats_change_no_bit(dim, groups):
    given = operands(dim, groups, "f32")
    probes, states, x, params, mask = given
    together = flat(cuda.BACKEND.penalty(*given, groups, PAPER, False))
    for _ in range(REPEATS):
        again = flat(cuda.BACKEND.penalty(*given, groups, PAPER, False))
        assert all(map(torch.equal, together, again))
    part = slice(1, 3)
    rows = [probes[:, :, part], states[:, part], [t[part] for t in x], params, mask[part]]
    value, *dx = flat(cuda.BACKEND.penalty(*rows, groups, PAPER, False))
    assert torch.equal(value, together[0][:, part])
    assert all(torch.equal(a, b[part]) for a, b in zip(dx, together[1:], strict=True))


@PATHS
def test_a_layers_penalty_never_synchronises(dim, groups):
    layer = layer_of(dim, groups, CELLS, torch.float32).requires_grad_(True)
    x = list(torch.randn(CELLS, ROWS, dim).to(DEVICE))
    info = layer(x, return_info=True)[1]
    info.jacobian_penalty().backward()  # compiles
    synchronize()
    with no_synchronisation():
        info.jacobian_penalty().backward()
    assert all(p.grad is not None for p in layer.parameters())
