"""The studies' problems and models against plain statements of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqfuse import Anderson, ConvergenceWarning, Implicit, ProFusion
from deqfuse.data import MultiviewData, Splits
from deqfuse.experiments import audiovisual, measurements, omics_data, synthetic
from deqfuse.experiments.audiovisual_models import LABELS as SENSES
from deqfuse.experiments.audiovisual_models import AudiovisualModel
from deqfuse.experiments.batched import MODELS, BatchedModel, initial_parameters
from deqfuse.experiments.mmdynamics import LABELS as OMICS_LABELS
from deqfuse.experiments.mmdynamics import SOLVED, MMDynamics
from deqfuse.experiments.models import ABLATIONS, LABELS, FusionClassifier, count_parameters
from deqfuse.experiments.study import Trial
from deqfuse.experiments.training import collect_warnings

# --- synthetic ---

SIZE = synthetic.Size(dim=3, rows=12, width=8)


class Joined(nn.Module):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, dim=-1)


def plain_model(name: str, seed: int) -> nn.Module:
    """One model of the study from ordinary modules."""
    values = initial_parameters(seed, name, SIZE.dim, SIZE.width)  # type: ignore[arg-type]

    def linear(key: str, suffix: str) -> nn.Linear:
        weight, bias = values[f"weight{key}{suffix}"], values[f"bias{key}{suffix}"]
        layer = nn.Linear(*weight.shape)
        layer.weight.data, layer.bias.data = weight.T.clone(), bias[0].clone()
        return layer

    encoders = [
        nn.Sequential(linear("1", f"_{i}"), nn.ReLU(), linear("2", f"_{i}"), nn.ReLU())
        for i in range(2)
    ]
    how: dict[str, Any] = (
        {"steps": 1 if name == "base" else int(name[-1])} if name[-1] != "m" else {}
    )
    if not how:
        how = {"solver": Anderson(tol=1e-6), "adjoint": Implicit(tol=1e-6)}
    model = ProFusion(encoders, Joined(), 2 * SIZE.width, head=linear("3", ""), **how)
    for i, back in enumerate(model.back_projections):
        if f"back{i}" in values:
            back.weight.data = values[f"back{i}"].T.clone()
    return model


@pytest.mark.parametrize("name", [name for name in MODELS if name != "deq"])
def test_batched_models_are_progressive_fusion(name: str) -> None:
    """Outputs and gradients of every model of a batch are those of the library's module."""
    problem = synthetic.draw_problem(SIZE, 1.0, 0.5, range(3)).rows(0, SIZE.rows)
    batch = BatchedModel(name, range(3), SIZE.dim, SIZE.width)  # type: ignore[arg-type]
    if batch.deq is not None:
        batch.deq.solver, batch.deq.adjoint = Anderson(tol=1e-6), Implicit(tol=1e-6)
    predicted, _ = batch(problem.views)
    (predicted - problem.target).square().mean(1).sum().backward()
    # Equilibria and adjoints are solved to 1e-6 by both, in float32.
    tol = 1e-4 if name == "pro equilibrium" else 1e-5
    for t in range(3):
        model = plain_model(name, t)
        expected = model([view[t] for view in problem.views]).squeeze(-1)
        assert torch.allclose(predicted[t], expected, atol=1e-5)
        (expected - problem.target[t]).square().mean().backward()
        encoder = model.encoders[0][0]  # type: ignore[index]
        grad = batch.shared["weight1_0"].grad
        assert grad is not None
        error = (grad[t].T - encoder.weight.grad).norm() / encoder.weight.grad.norm()
        assert error <= tol


@pytest.mark.parametrize("model", MODELS)
def test_problems_of_a_batch_do_not_see_each_other(model: str) -> None:
    trial = Trial("x", {"size": list(SIZE), "eta": 1.0, "sigma": 0.5, "model": model})
    study = synthetic.SyntheticStudy(steps=3, evaluate_every=1)
    many, one = (replace(study, seeds=seeds).run(trial) for seeds in (3, 1))
    # bmm rounds differently for another batch; a solve to 1e-3 may then stop a step earlier.
    rel = 1e-2 if model in ("pro equilibrium", "deq") else 1e-5
    assert many["test_mse"][0] == pytest.approx(one["test_mse"][0], rel=rel)
    assert many["chosen_step"][0] == one["chosen_step"][0]
    assert len(set(many["test_mse"])) == 3


def test_problem_follows_appendix_b1() -> None:
    plain, mixed = (synthetic.draw_problem(SIZE, eta, 0.0, range(2)) for eta in (0.0, -0.5))
    wave, first, disturbed = plain.views[1], plain.views[0], mixed.views[0]
    assert torch.equal(wave, mixed.views[1])
    assert torch.equal(plain.target, mixed.target)
    assert wave.abs().max() <= 1
    assert torch.allclose(disturbed - first, 2 * 0.5 * wave, atol=1e-6)  # 2 |eta| sin(W2 Z)
    assert not torch.equal(first[0], first[1])
    noisy = synthetic.draw_problem(SIZE, 0.0, 2.0, range(2))
    assert (noisy.views[1] - wave).std() == pytest.approx(2.0, rel=0.05)


def test_problem_is_computed_from_its_draws() -> None:
    """X1, X2 and Y of Appendix B.1 from the same draws, written out."""
    d, total = SIZE.dim, SIZE.rows + 3 * synthetic.HELD
    problem = synthetic.draw_problem(SIZE, 0.7, 0.3, [4])
    generator = torch.Generator().manual_seed(10_004)
    w1, w2 = (torch.randn(d, d, generator=generator) for _ in range(2))
    wy = torch.randn(d, generator=generator)
    z = torch.rand(total, d, generator=generator) * 5 - 2.5
    noise1, noise2 = (torch.randn(total, d, generator=generator) for _ in range(2))
    noise_y = torch.randn(total, generator=generator)
    hidden, wave = z @ w1 / d**0.5, torch.sin(z @ w2 / d**0.5)
    lrelu = torch.where(hidden > 0, hidden, 0.01 * hidden)
    for found, expected in (
        (problem.views[0][0], lrelu + 2 * 0.7 * wave + 0.1 * noise1),
        (problem.views[1][0], wave + 0.3 * noise2),
        (problem.target[0], z @ wy / d**0.5 + 0.1 * noise_y),
    ):
        assert torch.allclose(found, expected, atol=1e-5)


def test_penalty_of_the_batch_reaches_the_gradients() -> None:
    problem = synthetic.draw_problem(SIZE, 1.0, 0.0, range(2)).rows(0, SIZE.rows)
    model = BatchedModel("deq penalised", range(2), SIZE.dim, SIZE.width)
    model(problem.views)
    assert model.penalty is not None
    assert model.penalty.item() > 0
    model.penalty.backward()
    for layer in model.layers:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


# --- omics ---


VIEWS = MultiviewData(
    [torch.linspace(0, 1, 6 * n).reshape(n, 6).T.contiguous() for n in (5, 3)],
    torch.tensor([0, 1, 2, 0, 1, 2]), ("a", "b"), ("0", "1", "2"),
)  # fmt: skip


def weighted_encodings(model: MMDynamics, views: list[Tensor]) -> list[Tensor]:
    """What is fused, by the model's parts."""
    found = []
    for i, x in enumerate(views):
        h = F.relu(model.encoders[i](torch.sigmoid(model.gates[i](x)) * x))
        found.append(h * model.confidences[i](h))
    return found


@pytest.mark.parametrize("fusion", ["concat", "deq"])
def test_mmdynamics_loss_is_the_written_one(fusion: str) -> None:
    """Against the sum, term by term, as Han et al. have it."""
    torch.manual_seed(0)
    model = MMDynamics([5, 3], 3, fusion, dim=8).eval()
    own = []
    for i, x in enumerate(VIEWS.views):
        gate = torch.sigmoid(model.gates[i](x))
        h = F.relu(model.encoders[i](gate * x))
        probabilities = F.softmax(model.classifiers[i](h), dim=1)
        truth = probabilities[torch.arange(6), VIEWS.labels]
        error = model.confidences[i](h)[:, 0] - truth
        own.append(gate.mean() + error.square().mean() - truth.log().mean())
    weighted = weighted_encodings(model, VIEWS.views)
    fused = torch.cat(weighted, 1) if model.fusion is None else model.fusion(weighted)
    loss, info = model.loss(VIEWS)
    expected = F.cross_entropy(model.head(fused), VIEWS.labels) + sum(own)
    assert (info is None) == (fusion == "concat")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(model.parameters())
    for found, wanted in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)  # e.g. the confidence's target


def test_fusions_share_their_initial_values() -> None:
    states = []
    for fusion in OMICS_LABELS:
        torch.manual_seed(3)
        states.append(MMDynamics([5, 3], 2, fusion, dim=8).state_dict())
    for state in states[1:]:
        for name in states[0]:
            if not name.startswith("head"):
                assert torch.equal(states[0][name], state[name])


def test_fusions_of_mmdynamics_are_what_they_are_called() -> None:
    models = {}
    for fusion in OMICS_LABELS:
        torch.manual_seed(3)
        models[fusion] = MMDynamics([5, 3], 3, fusion, dim=8).eval()
    layers = {fusion: model.fusion for fusion, model in models.items() if model.fusion is not None}
    plain = {fusion for fusion, layer in layers.items() if not layer.injection_norm}
    assert plain == {"weighted", "norm", "paper"}
    assert {"concat", "base", "pro", *layers} == {*OMICS_LABELS}
    assert layers["tied"].weight_tied_steps == 5
    assert (layers["no-cell"].cell, layers["no-combine"].combine_kind) == ("identity", "sum")
    assert layers["no-gate"].combine is not None
    assert layers["no-gate"].combine.gate is None
    for fusion, model in models.items():
        with collect_warnings(ConvergenceWarning):  # a layer this small need not converge
            logits, info = model.logits(VIEWS.views)
        assert logits.shape == (6, 3)
        assert (info is not None) == (fusion in SOLVED)
    # The controls: GroupNorm of the ReLU of the sum, with and without unit injections.
    for fusion in ("norm", "unit-norm"):
        xs = weighted_encodings(models[fusion], VIEWS.views)
        if fusion == "unit-norm":
            xs = [x / x.square().mean(1, keepdim=True).sqrt() for x in xs]
        expected = models[fusion].head(F.group_norm(F.relu(xs[0] + xs[1]), 4))
        torch.testing.assert_close(models[fusion].logits(VIEWS.views)[0], expected)


def test_progressive_fusion_of_mmdynamics() -> None:
    """Its base is a layer on the concatenation; the second step sees what the first one fused."""
    models = {}
    for fusion in ("base", "pro"):
        torch.manual_seed(3)
        models[fusion] = MMDynamics([5, 3], 3, fusion, dim=8).eval()
    base, pro = models["base"], models["pro"]
    assert base.pro is not None
    assert pro.pro is not None
    layer = base.pro.fusion.layer.layer  # type: ignore[union-attr]
    context = F.relu(layer(torch.cat(weighted_encodings(base, VIEWS.views), 1)))
    torch.testing.assert_close(base.logits(VIEWS.views)[0], base.head(context))
    again = []
    for i, x in enumerate(VIEWS.views):
        gated = torch.sigmoid(pro.gates[i](x)) * x
        h = pro.encoders[i](gated + pro.pro.back_projections[i](context))
        again.append(h * pro.confidences[i](h))
    expected = pro.head(F.relu(pro.pro.fusion.layer.layer(torch.cat(again, 1))))  # type: ignore[union-attr]
    torch.testing.assert_close(pro.logits(VIEWS.views)[0], expected)
    assert count_parameters(base) == count_parameters(pro) - 8 * (5 + 3)  # back-projections


def test_omics_scales_on_training_rows() -> None:
    part = MultiviewData([torch.tensor([[1.0], [3.0]])], torch.tensor([0, 1]), ("a",), ("0", "1"))
    other = replace(part, views=[torch.tensor([[5.0], [1.0]])])
    _, validation, test = omics_data.scaled(Splits(part, other, other))
    assert validation.views[0].tolist() == test.views[0].tolist() == [[2.0], [0.0]]


# --- numerals and digits ---


@pytest.mark.parametrize("key", LABELS)
def test_numerals_models_train(key: str) -> None:
    """Every parameter that is counted gets a gradient."""
    torch.manual_seed(0)
    model = FusionClassifier(key, [4, 6, 5], 3).train()
    batch = MultiviewData(
        [torch.randn(5, n) for n in (4, 6, 5)], torch.tensor([0, 1, 2, 0, 1]), ("a", "b", "c"),
        ("0", "1", "2"),
    )  # fmt: skip
    loss, info = model.loss(batch)
    assert (info is not None) == (
        key not in ("concat", "weighted", "tied", "base", "pro 2", "pro 3")
    )
    loss.backward()
    used = sum(p.numel() for p in model.parameters() if p.grad is not None)
    assert used == model.num_parameters


def test_ablation_table_has_all_rows() -> None:
    assert set(ABLATIONS) == {"weighted", "tied", "no cell", "no combine", "no gate", "deq"}
    layers = {key: FusionClassifier(key, [4, 4], 2).fusion for key in ABLATIONS}
    assert layers["no cell"].cell == "identity"
    assert layers["no combine"].combine_kind == "sum"
    assert layers["no gate"].combine.gate is None
    assert layers["tied"].weight_tied_steps == 5
    assert layers["weighted"].combine_kind == "weighted_sum"


def test_base_is_one_step_of_progressive_fusion() -> None:
    views = [torch.randn(5, n) for n in (4, 6)]
    outputs = []
    for key in ("base", "pro 2"):
        torch.manual_seed(0)
        model = FusionClassifier(key, [4, 6], 3).eval()
        assert model.pro is not None
        model.pro.steps = 1
        outputs.append(model.logits(views)[0])
    assert torch.equal(*outputs)


def test_ridge_probe_separates_what_is_separable() -> None:
    labels = torch.arange(60) % 3
    generator = torch.Generator().manual_seed(0)
    clean = F.one_hot(labels).float() + 0.05 * torch.randn(60, 3, generator=generator)
    noise = torch.randn(60, 3, generator=generator)
    assert measurements.ridge_probe([clean] * 3, [labels] * 3) == 1.0
    assert measurements.ridge_probe([clean, clean, noise], [labels] * 3) < 0.7


@pytest.mark.parametrize("key", SENSES)
def test_audiovisual_models_train(key: str) -> None:
    torch.manual_seed(0)
    model = AudiovisualModel(key).train()
    views = [torch.rand(3, 1, 28, 28), torch.randn(3, 1, 112, 112)]
    batch = MultiviewData(views, torch.tensor([0, 1, 2]), ("image", "audio"), tuple("0123456789"))
    loss, _ = model.loss(batch)
    loss.backward()
    assert math.isfinite(loss.item())
    if key == "pro 2":  # the paper: 1.8% to 4.3%
        assert 0.05 < model.fusion.parameter_overhead < 0.07
        base = AudiovisualModel("base").num_parameters
        assert model.num_parameters / base - 1 == pytest.approx(model.fusion.parameter_overhead)


def test_pairs_are_of_the_same_digit() -> None:
    seen, spoken = torch.tensor([3, 1, 3, 1, 0]), torch.tensor([1, 0, 3, 1, 3])
    chosen = audiovisual.pair_digits(seen, spoken, seed=0)
    assert torch.equal(spoken[chosen], seen)
    assert torch.equal(chosen, audiovisual.pair_digits(seen, spoken, seed=0))
    with pytest.raises(ValueError, match="got none of 7"):
        audiovisual.pair_digits(torch.tensor([7]), spoken, seed=0)
