"""A Jacobian that cannot be measured is an error, never a zero."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from deqfuse import DEQ, DEQFusion, ProFusion, SolveInfo

DIM, N, ROWS = 8, 2, 5
MEASUREMENTS = ("jacobian_penalty", "spectral_radius")


def make(**options) -> DEQFusion:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return DEQFusion(DIM, N, num_groups=2, on_failure="ignore", **options).double()


def draw() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64) for _ in range(N)]


def of_a_layer() -> SolveInfo:
    return make()(draw(), return_info=True)[1]


def of_a_map() -> SolveInfo:
    torch.manual_seed(0)
    linear = nn.Linear(DIM, DIM)
    return DEQ(lambda z: torch.tanh(0.5 * linear(z)), on_failure="ignore")(torch.ones(3, DIM))[1]


@pytest.mark.parametrize("solve", [of_a_layer, of_a_map])
@pytest.mark.parametrize("measure", MEASUREMENTS)
def test_inference_mode_is_refused_with_the_remedy(measure, solve) -> None:  # type: ignore[no-untyped-def]
    remedy = rf"^{measure}: .*inference_mode.*Remedy: torch\.no_grad\(\)"
    outside = solve()
    with torch.inference_mode():
        inside = solve()
        for info in (inside, outside):
            with pytest.raises(RuntimeError, match=remedy):
                getattr(info, measure)()
    with pytest.raises(RuntimeError, match=remedy):
        getattr(inside, measure)()
    with torch.no_grad():
        assert getattr(solve(), measure)().sum() > 0


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda info: pickle.loads(pickle.dumps(info))])
@pytest.mark.parametrize("measure", MEASUREMENTS)
def test_copies_are_refused_and_closed_forms_stay_zero(measure, clone) -> None:  # type: ignore[no-untyped-def]
    kept = clone(of_a_layer())
    with pytest.raises(RuntimeError, match=rf"^{measure}: .*copy.*Remedy: measure before copying"):
        getattr(kept, measure)()
    with pytest.raises(RuntimeError, match="copy"):  # and a copy of a copy
        getattr(clone(kept.reshape(1, ROWS)), measure)()
    exact = clone(make(combine="weighted_sum")(draw(), return_info=True)[1])
    assert getattr(exact, measure)().sum() == 0


@pytest.mark.parametrize("measure", MEASUREMENTS)
def test_progressive_fusion_in_steps_has_none(measure) -> None:  # type: ignore[no-untyped-def]
    """No equilibrium: an objective for every fusion may add the penalty."""

    class Sum(nn.Module):
        def forward(self, encoded: list[Tensor]) -> Tensor:
            return encoded[0] + encoded[1]

    model = ProFusion([nn.Linear(3, DIM), nn.Linear(4, DIM)], Sum(), DIM, steps=2)
    _, info = model([torch.randn(ROWS, 3), torch.randn(ROWS, 4)], return_info=True)
    assert getattr(info, measure)().sum() == 0


@pytest.mark.parametrize(
    ("options", "blocks"),
    [({}, N + 1), ({"gate": False}, N), ({"combine": "sum"}, N), ({"cell": "identity"}, 1),
     ({"cell": "identity", "combine": "sum"}, 0)],
    ids=str,
)  # fmt: skip
def test_weight_tied_steps_are_measured(options, blocks) -> None:  # type: ignore[no-untyped-def]
    """After many steps the iterates are at the equilibrium, whose Jacobian the solve measures."""
    xs = draw()
    tied, solved = (
        make(**options, **more)(xs, return_info=True)[1] for more in ({"weight_tied_steps": 60}, {})
    )
    assert bool(tied.converged.all())
    radii = tied.spectral_radius(400)
    assert radii.shape == (blocks, ROWS)
    torch.testing.assert_close(radii, solved.spectral_radius(400), rtol=0.05, atol=1e-3)
    torch.manual_seed(1)
    penalty = tied.jacobian_penalty()
    torch.manual_seed(1)
    torch.testing.assert_close(penalty, solved.jacobian_penalty(), rtol=1e-2, atol=0.0)
    assert (penalty > 0) == (blocks > 0)


def test_the_penalty_of_weight_tied_steps_trains() -> None:
    layer = make(weight_tied_steps=3)
    layer(draw(), return_info=True)[1].jacobian_penalty().backward()
    assert layer.cells[1].linear2.weight.grad.abs().sum() > 0
    assert layer.combine.gate.weight.grad.abs().sum() > 0
