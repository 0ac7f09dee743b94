"""Where masks of missing modalities come from: NaN in the data, and dropout of whole modalities."""

from __future__ import annotations

import pytest
import torch
from presence_cases import N

from deqfuse import ModalityDropout, present_from_nan


def test_present_from_nan() -> None:
    a = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan], [torch.nan, 1.0]])
    b = torch.zeros(3, 5)
    assert present_from_nan([a, b]).tolist() == [[True, True], [False, True], [True, True]]
    assert present_from_nan([a, b], "any").tolist() == [[True, True], [False, True], [False, True]]
    assert present_from_nan([a[None], b[None]]).shape == (1, 3, 2)
    with pytest.raises(ValueError, match="absent: expected one of 'all', 'any'"):
        present_from_nan([a], "some")
    with pytest.raises(ValueError, match=r"features\[1\]"):
        present_from_nan([a, b[:2]])


def test_modality_dropout() -> None:
    torch.manual_seed(0)
    drop, xs = ModalityDropout(0.4), [torch.randn(20_000, 3) for _ in range(3)]
    kept = drop(xs)
    assert kept.dtype == torch.bool
    assert kept.any(1).all()
    # Dropped with probability p, unless it would have been the last: p^3 rows keep one in three.
    share = 0.4 - 0.4**3 / 3
    assert abs(float((~kept).double().mean()) - share) < 0.01
    counts = torch.stack([kept[kept.sum(1) == 1].double().mean(0)])
    torch.testing.assert_close(counts, torch.full_like(counts, 1 / 3), rtol=0, atol=0.02)
    torch.manual_seed(1)
    first = drop(xs)
    torch.manual_seed(1)
    assert torch.equal(first, drop(xs)), "seeded by torch"
    assert drop.eval()(xs).all()


def test_modality_dropout_keeps_to_what_is_present() -> None:
    torch.manual_seed(0)
    present = torch.rand(5000, N) > 0.5
    present[~present.any(1), 0] = True
    kept = ModalityDropout(0.9)([torch.randn(5000, 2)] * N, present)
    assert kept.any(1).all()
    assert not (kept & ~present).any()
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"p: expected a probability in \[0, 1\)"):
            ModalityDropout(wrong)
    with pytest.raises(TypeError, match="p: expected a number"):
        ModalityDropout("0.1")
    with pytest.raises(ValueError, match=r"features\[1\]: expected shape"):
        ModalityDropout()([torch.randn(3, 2), torch.randn(5, 2)])
    with pytest.raises(TypeError, match=r"features\[0\]: expected a torch.Tensor, got str"):
        ModalityDropout()(["a", "b"])
