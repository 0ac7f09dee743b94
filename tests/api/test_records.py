"""The record of a solve: rows summed up over blocks, and what it prints. Layers without values."""

from __future__ import annotations

import pytest
import torch

from deqfuse import DEQ, Anderson, BlockInfo, DEQFusion, OneStep, Outcome, SolveInfo


def block(residual: list, outcome: list) -> BlockInfo:  # type: ignore[type-arg]
    found = torch.tensor(residual)
    return BlockInfo(
        found,
        torch.ones(found.shape, dtype=torch.int32),
        torch.tensor(outcome, dtype=torch.int8),
    )


def test_rows_are_summed_up_over_blocks() -> None:
    nan = float("nan")
    done, limit, stalled, rescued = 0, Outcome.MAX_ITER, Outcome.STALLED, Outcome.RESCUED
    fuse = block(
        [1e-6, 0.5, 1e-6, nan, 1e-6, 1e-6, 0.5],
        [done, limit, rescued, Outcome.NON_FINITE, done, rescued, limit],
    )
    cells = block(
        [[1e-5, 0.1, 1e-7, 0.2, 1e-7, 1e-7, 1e-7], [1e-7, 1e-7, 0.3, 1e-7, 1e-7, 1e-7, 1e-7]],
        [[done, stalled, done, done, done, done, rescued],
         [done, done, limit, stalled, rescued, done, done]],
    )  # fmt: skip
    info = SolveInfo(fuse, cells, "reference")
    assert info.outcome.tolist() == [done, stalled, limit, stalled, rescued, rescued, limit]
    assert info.outcome.dtype == torch.int8
    assert info.converged.tolist() == [True, False, False, False, True, True, False]
    assert info.rescued.tolist() == [False, False, True, False, True, True, True]
    torch.testing.assert_close(
        info.residual, torch.tensor([1e-5, 0.5, 0.3, nan, 1e-6, 1e-6, 0.5]),
        rtol=0, atol=0, equal_nan=True,
    )  # fmt: skip


def test_records_of_a_layer_and_of_a_map() -> None:
    torch.manual_seed(0)
    layer = DEQFusion(16, 3, solver=Anderson(max_iter=3), on_failure="ignore")
    _, info = layer([torch.randn(2, 4, 16) for _ in range(3)], return_info=True)
    assert info.residual.shape == info.outcome.shape == (2, 4)
    assert torch.equal(
        info.residual, torch.cat([info.cells.residual, info.fuse.residual[None]]).amax(0)
    )
    assert repr(info) == f"SolveInfo(rows=(2, 4), cells=(3, 2, 4), backend={info.backend!r})"
    _, info = DEQ(torch.cos)(torch.zeros(5, 1))
    assert torch.equal(info.residual, info.fuse.residual)
    assert torch.equal(info.outcome, info.fuse.outcome)
    assert repr(info) == f"SolveInfo(rows=(5,), backend={info.backend!r})"


@pytest.mark.parametrize(
    "options",
    [{}, {"gate": False}, {"cell": "identity"}, {"adjoint": OneStep()}, {"in_dims": (8, 8)},
     {"solver": Anderson(trace=True)}],
    ids=str,
)  # fmt: skip
def test_meta_tensors_have_shapes_forward_and_backward(options) -> None:  # type: ignore[no-untyped-def]
    layer = DEQFusion(8, 2, device="meta", **options)
    xs = [torch.empty(3, 8, device="meta", requires_grad=True) for _ in range(2)]
    z, info = layer(xs, return_info=True)
    assert z.is_meta
    assert z.shape == (3, 8)
    assert info.fuse.nfe.shape == (3,)
    z.sum().backward()
    assert all(x.grad.shape == x.shape for x in xs)
    with torch.no_grad():
        assert layer(xs).is_meta
