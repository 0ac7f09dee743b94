"""``ProFusion`` and the modules it is given: sites, chance, state, copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from progressive_cases import (
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
    ProFusion,
)

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


@pytest.mark.parametrize("sites", SITES, ids=["input", "inside"])
@pytest.mark.parametrize("how", [{"steps": 3}, {"solver": TIGHT}], ids=str)
def test_inference_mode(how: dict[str, Any], sites: list[str] | None) -> None:
    """Inference tensors have no version counter."""
    model, xs = lively(build(sites=sites, **how)).eval(), features()
    with torch.no_grad():
        expected = model(xs)
    with torch.inference_mode():
        torch.testing.assert_close(model(xs), expected, rtol=1e-12, atol=1e-12)


def test_encoders_may_have_another_dtype_than_the_fusion() -> None:
    """Contexts in float32, encoders in bfloat16: the context is rounded where it enters them."""

    class Widened(Join):
        def forward(self, xs: Any) -> Any:
            return super().forward([x.float() for x in xs])

    torch.manual_seed(0)
    parts = [encoder.bfloat16() for encoder in encoders()]
    model = ProFusion(parts, Widened(10), K, steps=3)
    output, contexts = model(features(torch.bfloat16), return_contexts=True)  # type: ignore[arg-type]
    assert output.dtype == torch.float32
    assert not torch.equal(contexts[0], contexts[1])
    output.sum().backward()
    assert all(v.weight.grad.abs().sum() > 0 for v in model.back_projections)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["head", "headless"])
def test_batch_norm_is_refused_by_place_not_by_name(name: str) -> None:
    """Only what lies in the head sees the equilibrium once."""
    norm = nn.Sequential(nn.Linear(K, 4), nn.BatchNorm1d(4)).double()
    model = build(solver=TIGHT)
    if name == "head":
        model.head = norm
        assert model(features()).shape == (B, 4)
        return
    model.headless = norm
    with pytest.raises(ValueError, match=r"headless\.1: expected rows that do not depend"):
        model(features())


class Noisy(nn.Module):
    """Draws before its site, between submodules, and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3))
        self.b = nn.Linear(5, 5)

    def forward(self, x: Tensor, injected: Tensor | float = 0.0) -> Tensor:
        h = nn.functional.dropout(torch.tanh(self.a(x)), 0.5)
        return torch.tanh(nn.functional.dropout(self.b(h + injected), 0.5))


@pytest.mark.parametrize("inner", [False, True], ids=["input", "inside"])
def test_every_step_repeats_the_first_ones_draws(inner: bool) -> None:
    """Against the model written out, under one seed for every step; then its equilibrium."""
    torch.manual_seed(0)
    parts, fusion = [encoders(dropout=0.5)[0], Noisy()], nn.Sequential(Join(10), nn.Dropout(0.5))
    sites = ["3", "b"] if inner else None
    model = ProFusion(parts, fusion, K, steps=3, sites=sites).double()
    xs, c = features(), torch.zeros(B, K, dtype=torch.float64)
    torch.manual_seed(7)
    _, contexts = model(xs, return_contexts=True)
    for step in range(3):
        torch.manual_seed(7)
        v1, v2 = (c @ v.weight.mT for v in model.back_projections)
        if inner:
            first = parts[0][3:](parts[0][:3](xs[0]) + v1)  # type: ignore[index]
            c = fusion([first, parts[1](xs[1], v2)])
        else:
            c = fusion([parts[0](xs[0] + v1), parts[1](xs[1] + v2)])
        torch.testing.assert_close(contexts[step], c, rtol=1e-12, atol=1e-12)
    model.solver, model.steps = Anderson(tol=1e-10), None
    assert model(xs, return_info=True)[1].converged.all()


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
