"""The layer's Jacobian penalty as users meet it: ``info.jacobian_penalty()`` in a loss.

The kernels and their closed form are proved in tests/cpu/test_cpu_penalty.py; here it is the
operator: its gradient against a double backward of the equations, and its life with the rest of
torch.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from deqfuse import Anderson, DEQFusion, DoubleBackwardError, Implicit, SolveInfo
from deqfuse.backends import cpu_native
from deqfuse.backends.maps import VARIANTS
from deqfuse.backends.penalty import draw_probes
from deqfuse.diagnostics import jacobian_penalty

DIM, N, ROWS = 12, 3, 9
BACKENDS = ["reference"] + (["cpu"] if cpu_native.module is not None else [])
each_backend = pytest.mark.parametrize("backend", BACKENDS)
operator = torch.ops.deqfuse.penalty_layer.default
TIGHT = {"solver": Anderson(tol=1e-11, max_iter=300), "adjoint": Implicit(tol=1e-11)}


def make(dtype: torch.dtype = torch.float64, **options) -> DEQFusion:
    torch.manual_seed(0)
    given = {"num_groups": 3, "on_failure": "ignore", "injection_norm": False, **TIGHT, **options}
    layer = DEQFusion(DIM, N, **given).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return layer


def draw(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(ROWS, DIM, generator=generator).to(dtype) for _ in range(N)]


def seeded(penalty, *args, **kwargs) -> Tensor:
    torch.manual_seed(3)
    return penalty(*args, **kwargs)


def by_double_backward(info: SolveInfo, num_probes: int) -> Tensor:
    """The same quantity through two derivatives of the plain equations."""
    return jacobian_penalty([block()[:2] for block in info.blocks], num_probes)


def close(given, expected, *, rtol: float) -> None:
    """Relative to the largest entry of each tensor."""
    for a, b in zip(given, expected, strict=True):
        b = torch.zeros_like(a) if b is None else b
        assert (a - b).abs().max() <= rtol * b.abs().max().clamp_min(1e-6), (a - b).abs().max()


@each_backend
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_value_and_gradients_are_those_of_a_double_backward(backend, variant, dropout):
    layer = make(variant=variant, dropout=dropout, backend=backend)
    xs = [x.requires_grad_() for x in draw()]
    _, info = layer(xs, return_info=True)
    leaves = [*xs, *layer.parameters()]
    given, expected = (
        seeded(info.jacobian_penalty, 2), seeded(by_double_backward, info, 2)
    )  # fmt: skip
    close([given], [expected], rtol=1e-12)
    close(
        torch.autograd.grad(given, leaves, materialize_grads=True),
        torch.autograd.grad(expected, leaves, allow_unused=True),
        rtol=1e-10,
    )


@each_backend
def test_gradcheck(backend):
    """First derivatives, the equilibria held where the first solve found them."""
    layer = make(backend=backend)
    xs, params = [x.requires_grad_() for x in draw()], layer.parameters()
    z, zs, info = layer(xs, return_info=True, return_cells=True)
    states = torch.cat([zs, z[None]]).detach()
    flat = [t for cell in layer.cells for t in cell.flat()]
    flat += [*layer.combine.flat(), layer.modality_weights]
    assert len(flat) == len(list(params))
    torch.manual_seed(3)
    probes = draw_probes(states, 1)

    def penalty(*tensors: Tensor) -> Tensor:
        options = (layer.num_groups, layer.variant, info.backend)
        return operator(
            probes, states, list(tensors[:N]), list(tensors[N:]), None, None, *options, True
        )[0]  # fmt: skip

    # The value is some hundreds and its gradients too: differences of 1e-6 are exact to 1e-7.
    assert torch.autograd.gradcheck(
        penalty, (*xs, *flat), eps=1e-6, atol=1e-4, rtol=1e-4, fast_mode=True
    )


@each_backend
@pytest.mark.parametrize("want_params", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(backend, want_params, masked):
    layer = make(backend=backend)
    xs, (z, zs, info) = draw(), layer(draw(), return_info=True, return_cells=True)
    states = torch.cat([zs, z[None]]).detach()
    flat = [t.detach() for cell in layer.cells for t in cell.flat()]
    flat += [t.detach() for t in (*layer.combine.flat(), layer.modality_weights)]
    tensors = [*xs, *flat] if want_params else xs
    for t in tensors:
        t.requires_grad_()
    rows = states.shape[1]
    present = torch.arange(N * rows).reshape(N, rows, 1) % 3 > 0 if masked else None
    options = (3, "paper", info.backend, want_params)
    call = (draw_probes(states, 1), states, xs, flat, None, present, *options)
    assert set(torch.library.opcheck(operator, call).values()) == {"SUCCESS"}


def test_a_seed_gives_the_same_penalty_on_every_backend():
    values = []
    for backend in BACKENDS:
        info = make(backend=backend)(draw(), return_info=True)[1]
        values.append(seeded(info.jacobian_penalty, 3).item())
        assert seeded(info.jacobian_penalty, 3).item() == values[-1]
    assert max(values) - min(values) <= 1e-9 * max(values)


@each_backend
def test_compiled_in_one_graph(backend):
    layer, xs = make(backend=backend), draw()

    def loss(xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        z, info = layer(xs, return_info=True)
        return z.square().mul(torch.arange(DIM)).sum() + info.jacobian_penalty(), info.converged

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = []
    for call in (loss, compiled):
        value, converged = seeded(call, xs)
        assert converged.all()
        found.append([value, *torch.autograd.grad(value, list(layer.parameters()))])
    close(found[1], found[0], rtol=1e-9)


@each_backend
def test_checkpointed_and_under_autocast(backend):
    layer, xs = make(torch.float32, backend=backend), draw(torch.float32)
    parameters = list(layer.parameters())

    def loss(*xs: Tensor) -> Tensor:
        z, info = layer(list(xs), return_info=True)
        return z.square().mul(torch.arange(DIM)).sum() + 20 * info.jacobian_penalty()

    expected = torch.autograd.grad(seeded(loss, *xs), parameters)
    again = seeded(lambda: checkpoint(loss, *xs, use_reentrant=False))
    close(torch.autograd.grad(again, parameters), expected, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        below = seeded(loss, *xs)
    close(torch.autograd.grad(below, parameters), expected, rtol=0)


@each_backend
def test_functional_call_uses_the_lent_parameters(backend):
    layer, xs = make(backend=backend), draw()
    lent = {name: (1.1 * p).detach().requires_grad_() for name, p in layer.named_parameters()}

    class WithPenalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, xs: list[Tensor]) -> Tensor:
            return self.layer(xs, return_info=True)[1].jacobian_penalty()

    module = WithPenalty()
    given = seeded(functional_call, module, {f"layer.{k}": v for k, v in lent.items()}, (xs,))
    twin = copy.deepcopy(layer)
    twin.load_state_dict(lent)
    expected = seeded(twin(xs, return_info=True)[1].jacobian_penalty)
    close([given], [expected], rtol=1e-12)
    close(
        torch.autograd.grad(given, list(lent.values()), materialize_grads=True),
        torch.autograd.grad(expected, list(twin.parameters()), materialize_grads=True),
        rtol=1e-10,
    )
    assert all(p.grad is None for p in layer.parameters())


@each_backend
def test_transforms_take_the_form_that_they_can_follow(backend):
    layer, xs = make(backend=backend), torch.stack(draw())
    state = dict(layer.named_parameters())

    def penalty(state: dict[str, Tensor], xs: Tensor) -> Tensor:
        _, info = functional_call(layer, state, (list(xs),), {"return_info": True})
        return info.jacobian_penalty()

    given = seeded(grad(penalty), state, xs)
    info = layer(list(xs), return_info=True)[1]
    value = seeded(info.jacobian_penalty)
    expected = torch.autograd.grad(value, list(state.values()), materialize_grads=True)
    close(list(given.values()), expected, rtol=1e-8)

    other = xs.flip(1)
    same = seeded(
        vmap(grad(penalty), (None, 0), randomness="same"), state, torch.stack([xs, other])
    )
    single = [seeded(grad(penalty), state, each) for each in (xs, other)]
    for name, mapped in same.items():
        close(list(mapped), [call[name] for call in single], rtol=1e-8)


@each_backend
def test_no_second_derivative(backend):
    layer = make(backend=backend)
    penalty = layer(draw(), return_info=True)[1].jacobian_penalty()
    weight = layer.cells[0].linear1.weight
    (first,) = torch.autograd.grad(penalty, weight, create_graph=True)
    with pytest.raises(DoubleBackwardError):
        first.square().sum().backward()


@each_backend
def test_nothing_is_computed_for_parameters_without_gradients(backend, monkeypatch):
    """Frozen parameters cost no weight gradients, and no_grad() gives a plain number."""
    layer = make(backend=backend).requires_grad_(False)
    xs = [x.requires_grad_() for x in draw()]
    info = layer(xs, return_info=True)[1]
    penalty = seeded(info.jacobian_penalty)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(penalty, xs))
    with torch.no_grad():
        assert not seeded(info.jacobian_penalty).requires_grad
        assert seeded(info.jacobian_penalty) == penalty


def test_probability_keeps_the_expectation():
    """Of 400 calls at 1/4 some hundred compute it, each of them four times as large."""
    torch.manual_seed(0)
    info = make(torch.float32)(draw(torch.float32), return_info=True)[1]
    always = torch.stack([info.jacobian_penalty() for _ in range(100)])
    sometimes = torch.stack([info.jacobian_penalty(probability=0.25) for _ in range(400)])
    computed = sometimes > 0
    # Binomial with mean 100 and standard deviation 8.7: five of these.
    assert abs(int(computed.sum()) - 100) <= 43
    spread = sometimes.std() / math.sqrt(400) + always.std() / math.sqrt(100)
    assert abs(sometimes.mean() - always.mean()) <= 5 * spread
    kept = sometimes[computed].mean() / 4
    assert abs(kept - always.mean()) <= 5 * (always.std() / math.sqrt(57) * 2)


def test_a_probability_is_refused_where_calls_are_recorded():
    layer, xs = make(torch.float32), draw(torch.float32)

    def sometimes(xs: list[Tensor]) -> Tensor:
        return layer(xs, return_info=True)[1].jacobian_penalty(probability=0.5)

    with pytest.raises(ValueError, match="probability: expected 1 under"):
        vmap(lambda x: sometimes([x] * N), randomness="different")(torch.stack(xs))
    # Dynamo words what is raised in a graph of its own accord.
    with pytest.raises(Exception, match="probability: expected 1 under"):
        torch.compile(sometimes, fullgraph=True, backend="eager")(xs)


def test_a_solve_without_derivatives_is_refused_whatever_is_drawn():
    with torch.inference_mode():
        info = make()(draw(), return_info=True)[1]
    for _ in range(5):
        with pytest.raises(RuntimeError, match="inference_mode"):
            info.jacobian_penalty(probability=1e-6)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"num_probes": 0}, ValueError, "num_probes: expected an int >= 1"),
        ({"probability": 0.0}, ValueError, "probability: expected a finite number > 0"),
        ({"probability": 1.5}, ValueError, r"probability: expected a number in \(0, 1\]"),
        ({"probability": "often"}, TypeError, "probability: expected a number"),
    ],
)
def test_wrong_arguments(given, error, text):
    info = make()(draw(), return_info=True)[1]
    with pytest.raises(error, match=text):
        info.jacobian_penalty(**given)


@each_backend
def test_an_empty_batch_has_no_penalty(backend):
    layer = make(backend=backend)
    info = layer([torch.zeros(0, DIM, dtype=torch.float64)] * N, return_info=True)[1]
    assert info.jacobian_penalty() == 0


@each_backend
def test_the_radius_by_products_is_the_one_by_autograd(backend):
    from deqfuse.diagnostics import spectral_radius

    info = make(backend=backend)(draw(), return_info=True)[1]
    given = seeded(info.spectral_radius, 80)
    torch.manual_seed(3)
    parts = [spectral_radius(f, z, 80) for f, z, *_ in (block() for block in info.blocks)]
    torch.testing.assert_close(given, torch.cat([parts[0], parts[1][None]]), rtol=1e-8, atol=0)
