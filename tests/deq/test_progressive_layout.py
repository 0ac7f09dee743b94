"""``ProFusion`` around encoders of (T, B, d), and others with a layout of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from deqfuse import Anderson, ProFusion

W, K, B = 6, 8, 4
HOW: list[dict[str, Any]] = [{"steps": 3}, {"solver": Anderson()}]
ids = repr


class Join(nn.Module):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.tanh(0.3 * sum(xs))


class Recurrent(nn.Module):
    """The last output of an LSTM over time-first inputs, which a parent cannot tell."""

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.rnn, self.batch_first = nn.LSTM(W, K, batch_first=batch_first), batch_first

    def forward(self, x: Tensor) -> Tensor:
        out = self.rnn(x)[0]
        return out[:, -1] if self.batch_first else out[-1]


class Attending(nn.Module):
    """Self-attention over time-first inputs, averaged over time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(W, 2, 8, dropout=0.0)
        self.out = nn.Linear(W, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x).mean(0))


class Swapping(nn.Module):
    """Takes (B, T, d) for a time-first layer, which an outer look at that layer would mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Recurrent()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1))


TIME_FIRST = {"LSTM": Recurrent, "TransformerEncoderLayer": Attending}


def influence(model: ProFusion, xs: list[Tensor]) -> Tensor:
    """(B, B): how far the context of row b moves the representation of row c."""
    with torch.no_grad():
        at = [
            model.encode(xs, context)[0] for context in torch.eye(B)[:, :, None].expand(-1, -1, K)
        ]
        rest = model.encode(xs, torch.zeros(B, K))[0]
    return torch.stack([(a - rest).abs().amax(1) for a in at])


@pytest.mark.parametrize("how", HOW, ids=ids)
@pytest.mark.parametrize("steps", [1, B, B + 3])
@pytest.mark.parametrize("kind", TIME_FIRST)
def test_a_time_first_encoder_is_refused_or_told(kind: str, steps: int, how: Any) -> None:
    torch.manual_seed(0)
    xs = [torch.randn(steps, B, W)]
    encoder = TIME_FIRST[kind]().eval()
    with pytest.raises(ValueError, match=r"Remedy: batch_dims, 1 for \(T, B, d\)"):
        ProFusion([encoder], Join(), K, **how)(xs)
    model = ProFusion([encoder], Join(), K, batch_dims=[1], **how).eval()
    assert model(xs).shape == (B, K)
    moved = influence(model, xs)
    assert (moved.diagonal() > 0).all()
    assert not (moved - moved.diagonal().diag()).any()


@pytest.mark.parametrize("steps", [1, B, B + 3])
@pytest.mark.parametrize("encoder", [Swapping, lambda: Recurrent(batch_first=True)])
def test_batch_first_inputs_need_no_word(encoder: Callable[[], nn.Module], steps: int) -> None:
    torch.manual_seed(0)
    xs = [torch.randn(B, steps, W)]
    model = ProFusion([encoder()], Join(), K, steps=2)
    model(xs)
    moved = influence(model, xs)
    assert not (moved - moved.diagonal().diag()).any()


@pytest.mark.parametrize("site", ["rnn", "layer"])
def test_a_site_that_is_a_layer_says_its_layout(site: str) -> None:
    torch.manual_seed(0)
    encoder = Recurrent() if site == "rnn" else Attending()
    model = ProFusion([encoder], Join(), K, sites=[site], steps=2)
    xs = [torch.randn(B, B, W)]
    model(xs)
    moved = influence(model, xs)
    assert not (moved - moved.diagonal().diag()).any()


@pytest.mark.parametrize("how", ["concat", "add"])
def test_columns_for_time_first_inputs(how: Any) -> None:
    """concat: the same by extra columns of a Linear, and of an encoder that was built wider."""
    torch.manual_seed(0)

    class Steps(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear, self.rnn = nn.Linear(width, W), Recurrent()

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.linear(x))

    for width, in_dims in ((W, None), (W + 3, [W])) if how == "concat" else ((W, None),):
        xs = [torch.randn(B, B, W)]
        options: dict[str, Any] = {"inject": how, "in_dims": in_dims, "steps": 2}
        with pytest.raises(ValueError, match="batch_dims"):
            ProFusion([Steps(width)], Join(), K, **options)(xs)
        model = ProFusion([Steps(width)], Join(), K, batch_dims=[1], **options)
        model(xs)
        moved = influence(model, xs)
        assert (moved.diagonal() > 0).all()
        assert not (moved - moved.diagonal().diag()).any()


def test_the_check_leaves_no_trace() -> None:
    """Modes, buffers and generators are as of a model that was never checked; it is done once."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.drop = nn.Linear(W, K), nn.BatchNorm1d(K), nn.Dropout(0.5)
            self.norm.eval()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.drop(self.norm(self.linear(x).mean(1)))

    found = []
    for length in (B, B + 1):  # checked; not checked
        torch.manual_seed(0)
        model = ProFusion([Normed()], Join(), K, steps=3)
        modes = [m.training for m in model.modules()]
        torch.manual_seed(1)
        x = torch.randn(B, length, W)
        torch.manual_seed(2)
        model([x])
        assert modes == [m.training for m in model.modules()]
        found.append((torch.get_rng_state(), model.encoders[0].norm.num_batches_tracked.clone()))
        before = model.encoders[0].calls
        model([x])
        assert model.encoders[0].calls == before + 3
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_named_tuples_and_packed_sequences() -> None:
    class Padded(NamedTuple):
        values: Tensor
        lengths: Tensor

    class OfPadded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(W, K)

        def forward(self, x: Padded) -> Tensor:
            return self.linear(x.values.sum(1) / x.lengths[:, None])

    x = Padded(torch.randn(B, 3, W), torch.tensor([1, 2, 3, 3]))
    assert ProFusion([OfPadded()], Join(), K, steps=2)([x]).shape == (B, K)
    packed = nn.utils.rnn.pack_padded_sequence(x.values, x.lengths, True, enforce_sorted=False)
    with pytest.raises(TypeError, match=r"got PackedSequence.*Remedy: another site"):
        ProFusion([nn.LSTM(W, K)], Join(), K, steps=2)([packed])


def test_batch_dims_is_checked() -> None:
    with pytest.raises(ValueError, match=r"batch_dims\[0\]: expected 0, or 1 for inputs"):
        ProFusion([nn.Linear(W, K)], Join(), K, batch_dims=[2])
    with pytest.raises(ValueError, match=r"batch_dims\[0\]"):
        ProFusion([nn.Conv1d(W, K, 1)], Join(), K, batch_dims=[1])
    with pytest.raises(ValueError, match="batch_dims: expected dimensions, one for each of 1"):
        ProFusion([nn.Linear(W, K)], Join(), K, batch_dims=[0, 1])
