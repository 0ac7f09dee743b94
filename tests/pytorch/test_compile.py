"""``torch.compile`` as people use it: inductor, one recompilation for all batch sizes, modes.

Graphs of every variant without code generation, which is fast, are tested in test_ops.py.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator

import pytest
import torch
from devices import every_device  # noqa: F401 - autouse
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from deqfuse import DEQ, Anderson, DEQFusion, Implicit, Unrolled

DIM, N = 16, 3
TIGHT = {"solver": Anderson(tol=1e-6, max_iter=200), "adjoint": Implicit(tol=1e-6)}
in_ci = os.environ.get("CI", "").lower() == "true"
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None and not in_ci,
    reason="inductor needs a C++ compiler",
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(**options) -> DEQFusion:
    torch.manual_seed(0)
    return DEQFusion(DIM, N, **{"on_failure": "ignore", **options})


def draw(rows: int, *, width: int = DIM) -> list[Tensor]:
    return [torch.randn(rows, width) for _ in range(N)]


def step(call, layer: DEQFusion, xs: list[Tensor]) -> list[Tensor]:
    """Output and gradients of a training step."""
    torch.manual_seed(1)
    xs = [x.detach().requires_grad_() for x in xs]
    z = call(xs)
    return [z, *torch.autograd.grad(z, [*xs, *layer.parameters()], torch.randn_like(z))]


@needs_compiler
@pytest.mark.parametrize(
    ("dynamic", "graphs"),
    [(None, 2), pytest.param(True, 1, marks=pytest.mark.slow)],
    ids=["default", "dynamic"],
)
def test_training_steps_of_five_batch_sizes(dynamic, graphs):
    """By default the first size is compiled as it is, the second for all sizes, and that is all."""
    layer = make(in_dims=[5] * N, **TIGHT)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=dynamic)
    for rows in (4, 8, 13, 32, 5):
        xs = draw(rows, width=5)
        for given, expected in zip(
            step(compiled, layer, xs), step(layer, layer, xs), strict=True
        ):  # solved alike; the projections may be fused with what surrounds them
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == graphs


@needs_compiler
@pytest.mark.parametrize(
    "mode", [pytest.param(torch.no_grad, marks=pytest.mark.slow), torch.inference_mode]
)
def test_inference_of_five_batch_sizes(mode):
    layer = make().eval()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with mode():
        for rows in (4, 8, 13, 32, 5):
            xs = draw(rows)
            z, info = compiled(xs, return_info=True)
            expected, eager = layer(xs, return_info=True)
            torch.testing.assert_close(z, expected)
            assert torch.equal(info.nfe, eager.nfe)
            assert info.converged.all()
    assert counter.frame_count == 2


# ---- what needs no code generation ---------------------------------------------------------------


def without_codegen(call, **options):
    return torch.compile(call, backend="aot_eager", **options)


def test_inside_a_bf16_region_the_solve_keeps_float32():
    layer = make(in_dims=[5] * N, **TIGHT)

    device = torch.get_default_device().type

    def region(xs: list[Tensor]):
        with torch.autocast(device, dtype=torch.bfloat16):
            return layer(xs, return_info=True)

    xs = draw(6, width=5)
    z, info = without_codegen(region, fullgraph=True)(xs)
    expected, eager = region(xs)
    assert z.dtype == expected.dtype == torch.bfloat16  # storage follows the projections
    assert info.fuse.residual.dtype == torch.float32
    assert info.converged.all()  # 1e-6 is out of reach of bf16
    assert eager.converged.all()
    torch.testing.assert_close(z, expected, rtol=2**-7, atol=2**-7)  # two roundings of bf16
    z.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_solves_again_and_draws_the_same_mask(use_reentrant, dropout):
    layer = make(dropout=dropout, **TIGHT)
    xs = draw(5)

    def saving_memory(xs: list[Tensor]) -> Tensor:
        return checkpoint(lambda *xs: layer(list(xs)), *xs, use_reentrant=use_reentrant)

    def gradients(call) -> list[Tensor]:  # reentrant checkpoints know backward() only
        leaves = [x.detach().requires_grad_() for x in xs]
        layer.zero_grad()
        torch.manual_seed(1)
        z = call(leaves)
        torch.manual_seed(2)
        z.backward(torch.randn(z.shape))
        return [z, *(t.grad.clone() for t in (*leaves, *layer.parameters()))]

    expected = gradients(layer)
    for given, plain in zip(gradients(saving_memory), expected, strict=True):
        assert torch.equal(given, plain)
    if not use_reentrant:
        compiled = without_codegen(saving_memory, fullgraph=True)
        for given, plain in zip(gradients(compiled), expected, strict=True):
            torch.testing.assert_close(given, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"weight_tied_steps": 2}, {"combine": "weighted_sum"}, {"backend": "reference"}],
    ids=str,
)  # fmt: skip
def test_ablations_and_reference(options):
    layer, xs = make(**options), draw(5)
    compiled = without_codegen(layer, fullgraph=True)
    for given, expected in zip(step(compiled, layer, xs), step(layer, layer, xs), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_parametrised_weights():
    layer, xs = make(**TIGHT), draw(5)
    for cell in layer.cells:
        torch.nn.utils.parametrizations.spectral_norm(cell.linear2)
    layer.eval()  # in training mode every forward is a step of its power iteration
    compiled = without_codegen(layer, fullgraph=True)
    for given, expected in zip(step(compiled, layer, xs), step(layer, layer, xs), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


# ---- loops that no graph holds -------------------------------------------------------------------


# Torch looks at .grad of whatever comes out of a graph break, and warns itself.
breaks_graphs = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def equilibrium() -> tuple[torch.nn.Linear, DEQ]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(DIM, DIM)
    return linear, DEQ(lambda z, x: torch.tanh(0.3 * linear(z) + x), solver=Anderson(tol=1e-6))


def test_a_full_graph_of_a_data_dependent_loop_is_refused_with_the_remedy():
    _, deq = equilibrium()
    layer = make(adjoint=Unrolled())
    refusal, x = torch._dynamo.exc.Unsupported, torch.randn(5, DIM)
    with pytest.raises(refusal, match=r"Remedy: compile f itself, DEQ\(torch.compile\(f\)\)"):
        without_codegen(lambda x: deq(torch.zeros_like(x), x)[0], fullgraph=True)(x)
    with pytest.raises(refusal, match=r"Unrolled\(\) iterates .* Remedy: Implicit\(\)"):
        without_codegen(layer, fullgraph=True)(draw(5))


@breaks_graphs
def test_with_graph_breaks_they_are_right():
    linear, deq = equilibrium()
    x = torch.randn(5, DIM)

    def call(x: Tensor) -> Tensor:
        return deq(torch.zeros_like(x), 2 * x)[0].square()

    compiled = without_codegen(call)
    torch.testing.assert_close(compiled(x), call(x))
    given, expected = (
        torch.autograd.grad(f(x).sum(), list(linear.parameters())) for f in (compiled, call)
    )
    torch.testing.assert_close(given, expected)

    layer, xs = make(adjoint=Unrolled()), draw(5)
    compiled = without_codegen(layer)
    for given, expected in zip(step(compiled, layer, xs), step(layer, layer, xs), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


@breaks_graphs
def test_the_map_of_an_equilibrium_may_be_compiled():
    linear, deq = equilibrium()
    counter, x = CompileCounterWithBackend("aot_eager"), torch.randn(5, DIM, requires_grad=True)
    fast = DEQ(torch.compile(deq.f, backend=counter, fullgraph=True), solver=deq.solver)
    leaves = [x, *linear.parameters()]
    given, expected = (
        torch.autograd.grad(d(torch.zeros(5, DIM), x)[0].square().sum(), leaves)
        for d in (fast, deq)
    )
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2  # with and without gradients


def test_advice_about_tf32_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor gives it on every card since 8.0; any other warning stops a test here."""
    from torch._inductor import compile_fx

    class Card:
        major = 9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Card)
    warned = getattr(compile_fx._warn_tf32_disabled, "__wrapped__", None)
    if warned is None:
        pytest.skip("this torch gives it elsewhere")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warned()
    (message,) = [w.message for w in caught]
    warnings.warn(message, stacklevel=1)  # under the filters of every test
