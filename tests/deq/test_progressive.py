"""``ProFusion``: the given model at one step, the recurrence, its equilibrium and gradients."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from progressive_cases import (
    EXACT,
    SITES,
    TIGHT,
    WIDTHS,
    B,
    Join,
    K,
    base,
    build,
    encoders,
    features,
    leaves,
    lively,
)
from torch import Tensor, nn

from deqfuse import (
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    DEQFusion,
    Implicit,
    NewtonKrylov,
    OneStep,
    Picard,
    ProFusion,
    Unrolled,
)


def naive_step(model: ProFusion, xs: Sequence[Tensor], c: Tensor) -> Tensor:
    """One application for injection at the inputs, written out."""
    encoded = []
    for i, (encoder, x) in enumerate(zip(model.encoders, xs, strict=True)):
        v = c @ model.back_projections[i].weight.mT  # type: ignore[operator, union-attr]
        if model.inject == "add":
            encoded.append(encoder(x + v))
            continue
        first, *rest = encoder  # type: ignore[misc]
        wide = torch.cat([first.weight, model.extra_columns[str(i)].weight], 1)
        z = torch.cat([x, v], 1) @ wide.mT + first.bias
        for layer in rest:
            z = layer(z)
        encoded.append(z)
    return model.fusion(encoded)


def dense_gradients(
    model: ProFusion, xs: Sequence[Tensor], wanted: Sequence[Tensor], g: Tensor
) -> list[Tensor]:
    """Implicit gradients of the context by factorising ``I - J`` of every row."""
    star = torch.zeros(B, K, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(500):
            star = naive_step(model, xs, star)
    jacobian = torch.func.jacrev(lambda c: naive_step(model, xs, c).sum(0))(star).movedim(0, 1)
    eye = torch.eye(K, dtype=star.dtype)
    u = torch.stack(
        [torch.linalg.solve((eye - j).mT, row) for j, row in zip(jacobian.detach(), g, strict=True)]
    )
    image = naive_step(model, xs, star)
    assert (image - star).abs().max() <= 1e-13
    return list(torch.autograd.grad(image, wanted, u))


# ---- the recurrence -----------------------------------------------------------------------------


@pytest.mark.parametrize("sites", SITES, ids=["input", "inside"])
@pytest.mark.parametrize("inject", ["add", "concat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_step_is_the_given_model_bit_for_bit(
    inject: str, sites: list[str] | None, dtype: torch.dtype
) -> None:
    model, xs = build(steps=1, inject=inject, sites=sites, dtype=dtype), features(dtype)
    found, expected = model(xs), base(model, xs)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    g = torch.randn_like(found)
    wanted = [p for part in (model.encoders, model.fusion, model.head) for p in part.parameters()]  # type: ignore[union-attr]
    for a, b in zip(
        torch.autograd.grad(found, wanted, g), torch.autograd.grad(expected, wanted, g), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inject", ["add", "concat"])
def test_steps_are_the_recurrence(inject: str) -> None:
    model, xs = lively(build(steps=3, inject=inject)), [x.requires_grad_() for x in features()]
    found, contexts = model(xs, return_contexts=True)
    assert contexts.shape == (3, B, K)
    expected = [naive_step(model, xs, torch.zeros(B, K, dtype=torch.float64))]
    for _ in range(2):
        expected.append(naive_step(model, xs, expected[-1]))
    torch.testing.assert_close(contexts, torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert torch.equal(model.head(contexts[0]), base(model, xs))  # type: ignore[misc]
    assert torch.equal(found, model.head(contexts[-1]))  # type: ignore[misc]
    assert (contexts[1] - contexts[0]).abs().amax(1).min() > 5e-3, "the context is seen"
    g = torch.randn_like(contexts)
    for a, b in zip(
        torch.autograd.grad(contexts, leaves(model, xs), g),
        torch.autograd.grad(torch.stack(expected), leaves(model, xs), g),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("inject", ["add", "concat"])
def test_a_site_inside_is_the_same_model_cut_there(inject: str) -> None:
    model, xs = lively(build(steps=3, inject=inject, sites=SITES[1])), features()
    inner = [encoder[int(cut) :] for encoder, cut in zip(model.encoders, ("3", "0"), strict=True)]  # type: ignore[index]
    twin = ProFusion(inner, model.fusion, K, steps=3, inject=inject, head=model.head).double()
    twin.back_projections, twin.extra_columns = model.back_projections, model.extra_columns
    cut = [model.encoders[0][:3](xs[0]), xs[1]]  # type: ignore[index]
    assert torch.equal(model(xs), twin(cut))


def test_encoders_that_have_the_extra_columns() -> None:
    """in_dims tells concatenation apart: the base model pads with zeros."""
    wide = [nn.Linear(6 + 4, 5), nn.Sequential(nn.Linear(3 + 2, 5), nn.Tanh())]
    model = ProFusion(wide, Join(10), K, steps=2, inject="concat", in_dims=WIDTHS).double()
    assert [tuple(v.weight.shape) for v in model.back_projections] == [(4, K), (2, K)]
    assert not model.extra_columns
    xs = features()
    _, contexts = model(xs, return_contexts=True)
    for t, c in enumerate([torch.zeros_like(contexts[0]), contexts[0]]):
        padded = [
            torch.cat([x, c @ v.weight.mT], 1)
            for x, v in zip(xs, model.back_projections, strict=True)
        ]
        expected = model.fusion([e(x) for e, x in zip(wide, padded, strict=True)])
        torch.testing.assert_close(contexts[t], expected, rtol=1e-12, atol=1e-12)
    model.steps = 1
    zeros = [nn.functional.pad(x, (0, n)) for x, n in zip(xs, (4, 2), strict=True)]
    assert torch.equal(model(xs), model.fusion([e(x) for e, x in zip(wide, zeros, strict=True)]))


def test_contexts_and_representations_belong_together() -> None:
    model, xs = lively(build(steps=3, dropout=0.5)).eval(), features()
    _, contexts = model(xs, return_contexts=True)
    assert torch.equal(model.fusion(model.encode(xs)), contexts[0])
    for t in (0, 1):
        torch.testing.assert_close(model.fusion(model.encode(xs, contexts[t])), contexts[t + 1])


def test_tuples_heads_and_what_is_returned() -> None:
    torch.manual_seed(0)
    model = ProFusion(encoders(), Join(10, extra=True), K).double()
    assert model.steps == 2
    xs = features()
    fused = model(xs)
    assert isinstance(fused, Tensor)
    assert fused.shape == (B, K)
    out, contexts, info = model(xs, return_contexts=True, return_info=True)
    assert torch.equal(out, contexts[-1])
    change = (contexts[1] - contexts[0]).norm(dim=1) / (contexts[1].norm(dim=1) + 1e-5)
    torch.testing.assert_close(info.fuse.residual, change.detach())
    assert (info.nfe == 2).all()
    assert not info.converged.any()
    model.steps = 60
    assert model(xs, return_info=True)[1].converged.all()


# ---- the equilibrium ----------------------------------------------------------------------------


@pytest.mark.parametrize("inject", ["add", "concat"])
@pytest.mark.parametrize(
    "solver", [TIGHT, Picard(tol=1e-12, max_iter=400), NewtonKrylov(tol=1e-12)], ids=repr
)
def test_gradients_are_the_dense_implicit_ones(inject: str, solver: Any) -> None:
    model = lively(build(solver=solver, adjoint=EXACT, inject=inject))
    xs = [x.requires_grad_() for x in features()]
    _, contexts, info = model(xs, return_contexts=True, return_info=True)
    assert info.converged.all()
    assert contexts.shape == (1, B, K)
    wanted, g = leaves(model, xs), torch.randn(B, K, dtype=torch.float64)
    expected = dense_gradients(model, xs, wanted, g)
    for found, exact in zip(torch.autograd.grad(contexts[0], wanted, g), expected, strict=True):
        assert (found - exact).abs().max() <= 1e-8 * exact.abs().max()


@pytest.mark.parametrize("sites", SITES, ids=["input", "inside"])
@pytest.mark.parametrize("inject", ["add", "concat"])
def test_gradcheck(inject: str, sites: list[str] | None) -> None:
    model = lively(build(solver=TIGHT, adjoint=EXACT, inject=inject, sites=sites))
    xs = [x[:2].requires_grad_() for x in features()]
    names = [name for name, _ in model.named_parameters()]

    def run(x1: Tensor, x2: Tensor, *parameters: Tensor) -> Tensor:
        lent = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, lent, ([x1, x2],))

    torch.autograd.gradcheck(run, (*xs, *model.parameters()))


@pytest.mark.parametrize("sites", SITES, ids=["input", "inside"])
@pytest.mark.parametrize("inject", ["add", "concat"])
def test_many_steps_become_the_equilibrium(inject: str, sites: list[str] | None) -> None:
    """Values and gradients, by a rate that is that of a contraction."""
    model = lively(build(solver=TIGHT, adjoint=EXACT, inject=inject, sites=sites))
    xs = [x.requires_grad_() for x in features()]
    twin = copy.deepcopy(model)
    twin.solver = None
    star, g = model(xs), torch.randn(B, 2, dtype=torch.float64)
    exact = torch.autograd.grad(star, leaves(model, xs), g)
    errors = []
    for steps in (3, 30, 150):
        twin.steps = steps
        found = twin(xs)
        gradients = torch.autograd.grad(found, leaves(twin, xs), g)
        worst = max(
            float((a - b).abs().max() / b.abs().max())
            for a, b in zip(gradients, exact, strict=True)
        )
        errors.append((float((found - star).detach().abs().max()), worst))
    assert errors[0][0] > 1e-6
    assert errors[0] > errors[1]
    assert max(errors[2]) <= 1e-9


def test_other_gradients() -> None:
    xs = [x.requires_grad_() for x in features()]
    g = torch.randn(B, 2, dtype=torch.float64)

    def gradients(adjoint: Any) -> Tensor:
        model = lively(build(solver=TIGHT, adjoint=adjoint))
        return torch.cat(
            [t.flatten() for t in torch.autograd.grad(model(xs), leaves(model, xs), g)]
        )

    exact = gradients(EXACT)
    assert (gradients(Unrolled()) - exact).norm() <= 1e-4 * exact.norm()
    assert 1e-3 < (gradients(OneStep()) - exact).norm() / exact.norm() < 1


def test_unrolled_solver_steps_are_steps() -> None:
    """Two plain iterations from zero are two steps, f(0) and its gradient included."""
    xs, g = features(), torch.randn(B, 2, dtype=torch.float64)
    solver = Picard(tol=1e-12, max_iter=2)
    found = []
    for how in ({"steps": 2}, {"solver": solver, "adjoint": Unrolled(), "on_failure": "ignore"}):
        model = lively(build(**how))  # type: ignore[arg-type]
        out = model(xs)
        found.append([out, *torch.autograd.grad(out, leaves(model, []), g)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_given_models_answer_is_not_computed_twice() -> None:
    """The first evaluation, f(0), is that of the given model; nfe counts it."""
    model, calls = build(solver=Anderson(), adjoint=Implicit()), []
    model.fusion.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        _, info = model(features(), return_info=True)
    assert len(calls) == int(info.nfe.max())


def test_deq_fusion_inside() -> None:
    """An equilibrium within the steps, and within the equilibrium."""
    torch.manual_seed(0)
    inner = DEQFusion(8, 2, num_groups=2, in_dims=[5, 5], solver=Anderson(tol=1e-11, max_iter=200))
    xs, g = features(), torch.randn(B, 8, dtype=torch.float64)
    found = []
    for how in ({"steps": 40}, {"solver": Anderson(tol=1e-10, max_iter=100)}):
        torch.manual_seed(1)
        model = ProFusion(encoders(), inner, 8, adjoint=Implicit(tol=1e-10), **how).double()  # type: ignore[arg-type]
        with torch.no_grad():
            for v in model.back_projections:
                v.weight.mul_(0.2)  # type: ignore[operator, union-attr]
        out = model(xs)
        found.append([out, *torch.autograd.grad(out, list(model.encoders.parameters()), g)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_rows_are_independent() -> None:
    model, xs = lively(build(solver=Anderson(tol=1e-10))), features()
    alone = torch.cat([model([x[b : b + 1] for x in xs]) for b in range(B)])
    torch.testing.assert_close(model(xs), alone, rtol=1e-9, atol=1e-9)
    xs[0][2] = float("nan")
    with pytest.warns(ConvergenceWarning, match="1 of 5 rows"):
        poisoned = model(xs)
    keep = [0, 1, 3, 4]
    torch.testing.assert_close(poisoned[keep], alone[keep], rtol=1e-9, atol=1e-9)
    assert poisoned[2].isnan().all()


def test_failure_is_said() -> None:
    xs = features()
    with pytest.warns(ConvergenceWarning, match=r"5 of 5 rows.*max_iter=6"):
        build(solver=Anderson(tol=1e-12, max_iter=3))(xs)
    with pytest.raises(ConvergenceError):
        build(solver=Anderson(tol=1e-12, max_iter=3), on_failure="raise")(xs)
    build(solver=Anderson(tol=1e-12, max_iter=3), on_failure="ignore")(xs)


def test_jacobian_penalty() -> None:
    """It is differentiable, and leaves the random stream where its own probes end."""
    model, xs = lively(build(solver=Anderson(), dropout=0.5)), features()
    torch.manual_seed(3)
    _, info = model(xs, return_info=True)
    after_forward = torch.get_rng_state()
    torch.rand(3)  # whatever else a training step draws
    penalty = info.jacobian_penalty(num_probes=2)
    after_penalty = torch.get_rng_state()
    torch.set_rng_state(after_forward)
    torch.rand(3)
    for _ in range(2):
        torch.randn(B, K, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), after_penalty)
    penalty.backward()
    gradient = model.back_projections[0].weight.grad  # type: ignore[union-attr]
    assert isinstance(gradient, Tensor)
    assert gradient.abs().max() > 0
    (radius,) = info.spectral_radius()
    assert (radius < 1).all()


def test_the_documentations_example_runs() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "how-to", "progressive.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {"__name__": "example"})
