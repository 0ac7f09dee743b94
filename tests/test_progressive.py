"""``ProFusion``: the given model at one step, the recurrence, its equilibrium and gradients."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
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

B, K = 5, 4
WIDTHS = (6, 3)
TIGHT = Anderson(tol=1e-12, max_iter=200)
EXACT = Implicit(tol=1e-12, max_iter=200)
SITES = (None, ["2", "0"])


class Join(nn.Module):
    """Late fusion in MultiBench's convention; as a tuple, something may follow the fused tensor."""

    def __init__(self, width: int, extra: bool = False) -> None:
        super().__init__()
        self.linear, self.extra = nn.Linear(width, K), extra

    def forward(self, xs: Sequence[Tensor]) -> Any:
        assert isinstance(xs, list)
        fused = torch.tanh(self.linear(torch.cat(xs, dim=-1)))
        return (fused, "extra") if self.extra else fused


def encoders(dropout: float = 0.0) -> list[nn.Module]:
    first = [nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5), nn.Tanh()]
    return [nn.Sequential(*first), nn.Sequential(nn.Linear(3, 5), nn.Dropout(dropout), nn.Tanh())]


def build(*, dropout: float = 0.0, dtype: torch.dtype = torch.float64, **options: Any) -> ProFusion:
    torch.manual_seed(0)
    head = nn.Linear(K, 2)
    if options.get("sites"):
        options["sites"] = ["3", "0"]
    return ProFusion(encoders(dropout), Join(10), K, head=head, **options).to(dtype)


def features(dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, width, generator=generator, dtype=dtype) for width in WIDTHS]


def base(model: ProFusion, xs: Sequence[Tensor]) -> Tensor:
    """The given late-fusion model, as its owner would write it."""
    out = model.fusion([encoder(x) for encoder, x in zip(model.encoders, xs, strict=True)])
    return model.head(out[0] if isinstance(out, tuple) else out)  # type: ignore[misc]


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


def lively(model: ProFusion) -> ProFusion:
    """Back-projections large enough that the context matters, the map still a contraction."""
    with torch.no_grad():
        for v in model.back_projections:
            v.weight.mul_(2.5)  # type: ignore[operator, union-attr]
    return model


def leaves(model: ProFusion, xs: Sequence[Tensor]) -> list[Tensor]:
    own = [model.encoders, model.fusion, model.back_projections, model.extra_columns]
    return [*(p for part in own for p in part.parameters()), *xs]  # type: ignore[union-attr]


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
    penalty = info.jacobian_penalty(num_probes=2)
    after_penalty = torch.get_rng_state()
    torch.set_rng_state(after_forward)
    for _ in range(2):
        torch.randn(B, K, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), after_penalty)
    penalty.backward()
    gradient = model.back_projections[0].weight.grad  # type: ignore[union-attr]
    assert isinstance(gradient, Tensor)
    assert gradient.abs().max() > 0
    (radius,) = info.spectral_radius()
    assert (radius < 1).all()


# ---- chance and state ---------------------------------------------------------------------------


@pytest.mark.parametrize("sites", SITES, ids=["input", "inside"])
@pytest.mark.parametrize("inject", ["add", "concat"])
@pytest.mark.parametrize("how", [{"steps": 300}, {"solver": Anderson(tol=1e-12)}], ids=str)
def test_dropout_is_drawn_once(how: dict[str, Any], inject: str, sites: list[str] | None) -> None:
    """One map in training too: it has an equilibrium, and the generator moves on as in one call."""
    model, xs = lively(build(dropout=0.5, inject=inject, sites=sites, **how)), features()
    torch.manual_seed(7)
    base(model, xs)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = model(xs)
    assert torch.equal(torch.rand(3), expected)
    other = copy.deepcopy(model)
    other.steps, other.solver = (300, None) if "solver" in how else (None, Anderson(tol=1e-12))
    torch.manual_seed(7)
    torch.testing.assert_close(other(xs), first, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(xs), first), "and another call draws again"


def test_dropout_of_the_fusion_and_between_modules_is_drawn_once_too() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.dropout(self.a(x), 0.5)
            return torch.tanh(nn.functional.dropout(self.b(h), 0.5))

    fusion = nn.Sequential(Join(10), nn.Dropout(0.5))
    torch.manual_seed(0)
    parts = [encoders(dropout=0.5)[0], Noisy()]
    model = ProFusion(parts, fusion, K, solver=Anderson(tol=1e-10), sites=["3", "b"]).double()
    _, info = model(features(), return_info=True)  # a warning would be an error
    assert info.converged.all()


def test_batch_norm() -> None:
    def normed() -> list[nn.Module]:
        torch.manual_seed(0)
        return [
            nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5), nn.BatchNorm1d(5)),
            nn.Sequential(nn.Linear(3, 5)),
        ]

    xs = features()
    model = ProFusion(normed(), Join(10), K, solver=Anderson()).double()
    with pytest.raises(ValueError, match=r"encoders\.0\.0: expected rows that do not depend.*eval"):
        model(xs)
    assert model.eval()(xs).shape == (B, K)

    parts = normed()
    model = ProFusion(parts, Join(10), K, solver=Anderson(tol=1e-9), sites=["1", ""]).double()
    with pytest.raises(ValueError, match=r"encoders\.0\.2"):
        model(xs)
    parts[0][2].eval()  # type: ignore[index]
    count = int(parts[0][0].num_batches_tracked)  # type: ignore[index, operator]
    model(xs)
    assert int(parts[0][0].num_batches_tracked) == count + 1  # type: ignore[index, operator]

    model = ProFusion(normed(), Join(10), K, steps=3).double()
    model(xs).square().sum().backward()
    assert int(model.encoders[0][0].num_batches_tracked) == 3  # type: ignore[index, operator]


def test_buffers_move_on_as_in_one_call() -> None:
    """Spectral norm's power iteration would make every evaluation another map."""
    parts = encoders()
    nn.utils.parametrizations.spectral_norm(parts[0][3])  # type: ignore[index]
    model, xs = ProFusion(parts, Join(10), K, solver=Anderson(tol=1e-12)).double(), features()
    twin = copy.deepcopy(model)
    for _ in range(2):
        assert model(xs, return_info=True)[1].converged.all()
        base(twin, xs) if twin.head else twin.fusion([e(x) for e, x in zip(twin.encoders, xs)])  # noqa: B905
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b)
    model(xs).square().sum().backward()


# ---- encoders and sites -------------------------------------------------------------------------


class Counting(nn.Module):
    """Linear layer that counts its calls."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(*sizes), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(x))


class Branching(nn.Module):
    """Forward of its own: a skip over the site, a submodule used before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = nn.Sequential(Counting(6, 5)), Counting(5, 5)
        self.block = nn.ModuleDict({"first": Counting(5, 5), "site": Counting(5, 5)})

    def forward(self, x: Tensor) -> Tensor:
        skip = self.shared(self.stem(x))
        h = self.block["site"](self.block["first"](skip) + 1)
        return self.shared(h) + skip


@pytest.mark.parametrize("how", [{"steps": 4}, {"solver": Anderson()}], ids=str)
def test_what_comes_before_the_site_is_computed_once(how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder, other = Branching(), nn.Sequential(Counting(3, 5), Counting(5, 5))
    model = ProFusion([encoder, other], Join(10), K, sites=["block.site", "1"], **how).double()
    keys = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        _, info = model(features(), return_info=True)
    times = int(info.nfe.max())
    assert times >= 4
    calls = [encoder.stem[0].calls, encoder.block["first"].calls, encoder.block["site"].calls]  # type: ignore[index]
    assert calls == [1, 1, times]
    assert encoder.shared.calls == 1 + times
    assert [part.calls for part in other] == [1, times]  # type: ignore[union-attr]
    assert [name for name, _ in model.named_modules()] == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_encoder_with_a_forward_of_its_own() -> None:
    torch.manual_seed(0)
    encoder = Branching()
    options: dict[str, Any] = {"sites": ["block.site", ""], "steps": 3}
    model = lively(ProFusion([encoder, nn.Linear(3, 5)], Join(10), K, **options).double())
    xs = [x.requires_grad_() for x in features()]
    _, contexts = model(xs, return_contexts=True)
    c, expected = torch.zeros(B, K, dtype=torch.float64), []
    for _ in range(3):
        v1, v2 = (c @ v.weight.mT for v in model.back_projections)
        skip = encoder.shared(encoder.stem(xs[0]))
        h = encoder.block["site"](encoder.block["first"](skip) + 1 + v1)
        c = model.fusion([encoder.shared(h) + skip, model.encoders[1](xs[1] + v2)])
        expected.append(c)
    torch.testing.assert_close(contexts, torch.stack(expected), rtol=1e-12, atol=1e-12)
    wanted, g = leaves(model, xs), torch.randn_like(contexts)
    for a, b in zip(
        torch.autograd.grad(contexts, wanted, g),
        torch.autograd.grad(torch.stack(expected), wanted, g),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_in_place_layers() -> None:
    torch.manual_seed(0)
    parts = [
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 5)),
    ]
    model = ProFusion(parts, Join(10), K, steps=3, in_dims=[6, 5], sites=["", "1"]).double()
    xs = features()
    kept = [x.clone() for x in xs]
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    assert torch.equal(model(xs), twin(kept))
    assert torch.equal(xs[0], kept[0]), "the caller's tensors are left alone"

    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            skip = self.a(x)
            h = self.b(skip)
            return skip.add_(h)

    parts[1] = Overwriting()
    model = ProFusion(parts, Join(10), K, steps=3, sites=["", "b"]).double()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"encoders\[1\]: what Linear computed"):
        model(features())
    assert isinstance(parts[1].a, nn.Linear), "and everything is put back"


def test_images_sequences_and_packed_inputs() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 5, batch_first=True)

        def forward(self, packed: Any) -> Tensor:
            x, lengths = packed
            return self.rnn(x)[0][torch.arange(len(x)), lengths - 1]

    torch.manual_seed(0)
    image = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    model = ProFusion([image, Last()], Join(10), K, steps=2)
    assert [tuple(v.weight.shape) for v in model.back_projections] == [(2, K), (3, K)]
    x, y, lengths = torch.randn(B, 2, 5, 5), torch.randn(B, 7, 3), torch.tensor([7, 3, 1, 5, 2])
    found, contexts = model([x, [y, lengths]], return_contexts=True)
    v1, v2 = (contexts[0] @ v.weight.mT for v in model.back_projections)
    expected = [image(x + v1[:, :, None, None]), model.encoders[1]([y + v2[:, None], lengths])]
    torch.testing.assert_close(found, model.fusion(expected))


def test_leading_dimensions() -> None:
    model = ProFusion([nn.Linear(6, 5), nn.Linear(3, 5)], Join(10), K, solver=TIGHT).double()
    xs = [torch.randn(B, 3, width, dtype=torch.float64) for width in WIDTHS]
    flat = model([x.flatten(0, 1) for x in xs])
    torch.testing.assert_close(model(xs).flatten(0, 1), flat, rtol=1e-9, atol=1e-9)


def test_parameters() -> None:
    model = build(inject="concat")
    added = {name for name, _ in model.named_parameters()} - {
        name for name, _ in build().named_parameters()
    }
    assert added == {"extra_columns.0.weight", "extra_columns.1.weight"}
    assert [tuple(v.weight.shape) for v in model.back_projections] == [(6, K), (3, K)]
    given = 6 * 8 + 8 + 8 * 5 + 5 + 3 * 5 + 5 + 10 * K + K + 2 * K + 2
    assert model.parameter_overhead == pytest.approx((9 * K + 6 * 8 + 3 * 5) / given)
    assert build().parameter_overhead == pytest.approx(9 * K / given)
    assert "inject='concat'" in repr(model)


@pytest.mark.parametrize("how", [{"steps": 2}, {"solver": TIGHT}], ids=str)
def test_copies(how: dict[str, Any]) -> None:
    model, xs = build(sites=SITES[1], **how), features()
    expected = model(xs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin(xs), expected)


# ---- refusals -----------------------------------------------------------------------------------


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
