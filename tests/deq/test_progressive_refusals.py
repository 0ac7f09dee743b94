"""What ``ProFusion`` refuses: options, modules, sites, inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from progressive_cases import TIGHT, B, Join, K, build, encoders, features
from torch import Tensor, nn

from deqfuse import ProFusion


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: expected an int >= 1, got 0"),
        ({"steps": 2, "solver": TIGHT}, ValueError, "steps, solver: expected one of them"),
        ({"solver": "anderson"}, TypeError, "solver: expected Anderson"),
        ({"inject": "multiply"}, ValueError, "inject: expected one of 'add', 'concat'"),
        ({"in_dims": [6]}, ValueError, "in_dims: expected widths, one for each of 2 encoders"),
        ({"in_dims": [6, 0]}, ValueError, r"in_dims\[1\]: expected an int >= 1, got 0"),
        ({"inject": "concat", "in_dims": [9, 3]}, ValueError, r"in_dims\[0\]: expected at most 6"),
        ({"site": "0"}, TypeError, "sites"),
        ({"head": len}, TypeError, "head: expected a torch.nn.Module, got builtin"),
        ({"on_failure": "panic"}, ValueError, "on_failure: expected one of"),
    ],
    ids=lambda o: str(o) if isinstance(o, dict) else "",
)
def test_options_are_checked(options: dict[str, Any], error: type, message: str) -> None:
    if "site" in options:
        options, message = {"sites": "0"}, "sites: expected a sequence of names of submodules"
    with pytest.raises(error, match=message):
        ProFusion(encoders(), Join(10), K, **options)


def test_modules_and_sites_are_checked() -> None:
    parts = encoders()
    with pytest.raises(ValueError, match="encoders: expected at least one module"):
        ProFusion([], Join(10), K)
    with pytest.raises(TypeError, match=r"encoders\[1\]: expected a torch.nn.Module, got function"):
        ProFusion([parts[0], lambda x: x], Join(10), K)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"sites\[0\]: expected the name .*'0', '1'.*got 'conv'"):
        ProFusion(parts, Join(10), K, sites=["conv", ""])
    with pytest.raises(ValueError, match=r"in_dims: expected the width .* of encoders\[0\]"):
        ProFusion(parts, Join(10), K, sites=["1", ""])
    conv = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 5))
    with pytest.raises(ValueError, match=r"'concat' expected a Linear .*encoders\[0\].*got Conv2d"):
        ProFusion([conv, parts[1]], Join(10), K, inject="concat")


def test_inputs_are_checked() -> None:
    model, xs = build(), features()
    with pytest.raises(ValueError, match="inputs: expected one for each of 2 encoders, got 1"):
        model(xs[:1])
    with pytest.raises(TypeError, match="inputs: expected a sequence"):
        model({"a": 1})
    with pytest.raises(ValueError, match=r"fusion's output: expected shape \(B, 7\)"):
        ProFusion(encoders(), Join(10), 7).double()(xs)
    flat = [nn.Sequential(nn.Flatten(), nn.Linear(6, 5)), nn.Linear(3, 5)]
    with pytest.raises(
        ValueError, match=r"encoders\[0\]: expected .*width 6 on axis -1 at its input"
    ):
        ProFusion(flat, Join(10), K).double()([xs[0].view(B, 2, 3), xs[1]])

    class Unused(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    lonely = Unused(6, 5)
    lonely.site = nn.Linear(5, 5)
    with pytest.raises(ValueError, match=r"encoders\[0\]: its forward never called .*'site'"):
        ProFusion([lonely, nn.Linear(3, 5)], Join(10), K, sites=["site", ""]).double()(xs)
    with pytest.raises(
        TypeError, match=r"encoders\[0\]: expected its site to be called with a tensor"
    ):
        model([{"x": xs[0]}, xs[1]])
    with pytest.raises(
        ValueError, match=r"encoders\[0\]: expected 6 columns .* got 4. Remedy: in_dims"
    ):
        build(inject="concat")([xs[0][:, :4], xs[1]])
    packed = nn.utils.rnn.pack_sequence([xs[0]])  # its rows are not the batch's
    with pytest.raises(TypeError, match=r"expected its site .* got PackedSequence"):
        model([packed, xs[1]])


def test_a_mask_is_refused_with_the_reason() -> None:
    """What an absent modality means belongs to the given model."""
    model, xs = build(), features()
    with pytest.raises(ValueError, match=r"present: expected None, got Tensor: .*Remedy: encoders"):
        model(xs, present=torch.ones(B, 2, dtype=torch.bool))


@pytest.mark.parametrize("how", [{"steps": 3}, {"solver": TIGHT}], ids=["steps", "equilibrium"])
def test_an_encoder_may_answer_marked_inputs(how: dict[str, Any]) -> None:
    """The remedy of that refusal: NaN marks an absent input, with and without a context."""

    class Marked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            absent = x.isnan().all(-1, keepdim=True)
            return super().forward(torch.where(absent, 0.0, x)).masked_fill(absent, 0.0)

    torch.manual_seed(0)
    model = ProFusion([Marked(6, 5), Marked(3, 5)], Join(10), K, **how).double()
    xs = [torch.randn(B, 6).double(), torch.randn(B, 3).double()]
    xs[1][0] = torch.nan
    out, contexts = model(xs, return_contexts=True)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert (model.encode(xs, contexts[-1])[1][0] == 0).all()
    assert (model.encode(xs, contexts[-1])[1][1] != 0).any()
