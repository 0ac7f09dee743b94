"""Rows that lack modalities: each is a row of the layer made of what it has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from given_cases import TanhCell
from presence_cases import (
    DIM,
    EACH,
    PATTERNS,
    N,
    add_gradients,
    layer_of,
    poisoned,
    present_rows,
    rows_with,
    sub_layer,
)
from torch import Tensor

from deqfuse import (
    Anderson,
    DEQFusion,
    Implicit,
    NewtonKrylov,
    Outcome,
    Unrolled,
    backends,
    functional,
    operators,
)
from deqfuse.backends.maps import VARIANTS
from deqfuse.backends.penalty import draw_probes
from deqfuse.backends.presence import only

BACKENDS = [name for name in ("cpu", "reference") if backends.load(name).unavailable() is None]
TIGHT = {"solver": Anderson(tol=1e-12, max_iter=300), "adjoint": Implicit(tol=1e-12, max_iter=300)}
GIVEN = {"cells": [TanhCell(dim=DIM), None, TanhCell(0.3, DIM), "residual"]}
ABLATIONS = {
    "given": GIVEN,
    "given, sum": {**GIVEN, "combine": "sum"},
    "given, steps": {**GIVEN, "weight_tied_steps": 3},
    "given, unrolled": {
        **GIVEN,
        "adjoint": Unrolled(),
        "solver": Anderson(tol=1e-13, max_iter=200),
    },
    "identity": {"cell": "identity"},
    "sum": {"combine": "sum"},
    "weighted sum": {"combine": "weighted_sum"},
    "no gate": {"gate": False},
    "steps": {"weight_tied_steps": 3},
    "unrolled": {"adjoint": Unrolled(), "solver": Anderson(tol=1e-13, max_iter=200)},
    "newton": {"solver": NewtonKrylov(tol=1e-12, max_iter=2000)},
    "normed": {"injection_norm": True},
    "projected": {"in_dims": (5, 12, 7, 3)},
}


def features(layer: DEQFusion) -> list[Tensor]:
    torch.manual_seed(1)
    widths = layer._widths()
    return [torch.randn(len(PATTERNS) * EACH, w, dtype=torch.float64) for w in widths]


def check_contract(layer: DEQFusion, **options: object) -> None:
    """Value and every gradient of each pattern's rows, what is absent being NaN."""
    present, xs = present_rows(), poisoned(features(layer), present_rows())
    with_cells = layer.combine_kind != "weighted_sum"
    z, *cells, info = layer(xs, present=present, return_cells=with_cells, return_info=True)
    g = torch.randn(N + 1, *z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(2))
    torch.autograd.backward([z, *cells], [g[-1], g[:-1]][: 1 + len(cells)])
    assert info.converged.all() or layer.weight_tied_steps

    total = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    for kept in PATTERNS:
        rows, sub = rows_with(present, kept), sub_layer(layer, kept, **options)
        own = [xs[i].detach()[rows].requires_grad_() for i in kept]
        expected, *expected_cells = sub(own, return_cells=with_cells), *()
        if with_cells:
            expected, *expected_cells = expected
        outputs = [expected, *expected_cells]
        torch.autograd.backward(outputs, [g[-1, rows], g[list(kept)][:, rows]][: len(outputs)])
        torch.testing.assert_close(z[rows], expected, rtol=1e-8, atol=1e-8)
        for k, i in enumerate(kept):
            if with_cells:
                torch.testing.assert_close(cells[0][i, rows], outputs[1][k], rtol=1e-8, atol=1e-8)
            grad = torch.zeros_like(own[k]) if own[k].grad is None else own[k].grad
            torch.testing.assert_close(xs[i].grad[rows], grad, rtol=1e-8, atol=1e-8)
        add_gradients(total, layer, sub, kept)
    for i, x in enumerate(xs):
        assert (x.grad[~present[:, i]] == 0).all(), "exactly"
        if with_cells:
            assert (cells[0][i, ~present[:, i]] == 0).all()
    for name, p in layer.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(grad, total[name], rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_is_that_of_its_own_layer(variant: str, backend: str) -> None:
    options = {"variant": variant, "backend": backend, **TIGHT}
    check_contract(layer_of(**options), **options)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_and_other_solvers(name: str) -> None:
    options = {**TIGHT, **ABLATIONS[name]}
    layer = layer_of(**options)
    options.pop("in_dims", None)
    if name != "projected":
        check_contract(layer, **options)
        return
    present, xs = present_rows(), poisoned(features(layer), present_rows())
    z = layer(xs, present=present)
    z.pow(2).sum().backward()
    assert all((x.grad[~here] == 0).all() for x, here in zip(xs, present.T, strict=True))
    # The layer behind the projections of what is present has been held to its sub-layers.
    plain, projections = layer_of(**TIGHT), copy.deepcopy(layer.projections)
    plain.load_state_dict(layer.state_dict(), strict=False)
    clean = [
        torch.where(here[:, None], x.detach(), 0.0).requires_grad_()
        for x, here in zip(xs, present.T, strict=True)
    ]
    projections.zero_grad()
    expected = plain([p(x) for p, x in zip(projections, clean, strict=True)], present=present)
    expected.pow(2).sum().backward()
    found = [z, *(x.grad for x in xs), *(p.grad for p in layer.parameters())]
    own = {n: p.grad for n, p in plain.named_parameters()}
    own |= {f"projections.{n}": p.grad for n, p in projections.named_parameters()}
    wanted = [expected, *(x.grad for x in clean), *(own[n] for n, _ in layer.named_parameters())]
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-8, atol=1e-8)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled backend")
@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_are_those_of_the_sub_layer(variant: str) -> None:
    options = {"variant": variant, "backend": "cpu"}
    layer = layer_of(**options).float()
    present, xs = present_rows(), [x.float() for x in features(layer)]
    z, cells, info = layer(xs, present=present, return_cells=True, return_info=True)
    for kept in PATTERNS:
        rows, sub = rows_with(present, kept), sub_layer(layer, kept, **options)
        own, own_cells, told = sub([xs[i][rows] for i in kept], return_cells=True, return_info=True)
        assert torch.equal(z[rows], own)
        assert torch.equal(cells[list(kept)][:, rows], own_cells)
        assert torch.equal(info.fuse.nfe[rows], told.fuse.nfe)
        assert torch.equal(info.cells.nfe[list(kept)][:, rows], told.cells.nfe)


@pytest.mark.parametrize("name", [*ABLATIONS, "plain"])
def test_without_gradients_nothing_is_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, present = layer_of(**{**TIGHT, **ABLATIONS.get(name, {})}), present_rows()
    xs = poisoned(features(layer), present)
    expected = layer(xs, present=present).detach()
    monkeypatch.setattr("deqfuse.nn.fusion.only", lambda *_: pytest.fail("copied"))
    with torch.no_grad():
        assert torch.equal(layer(xs, present=present), expected)
    layer(features(layer), present=torch.ones_like(present))


def test_what_the_record_says() -> None:
    layer, present = layer_of(), present_rows()
    _, info = layer(features(layer), present=present, return_info=True)
    absent = ~present.T
    assert (info.cells.outcome[absent] == Outcome.ABSENT).all()
    assert (info.cells.outcome[~absent] == Outcome.CONVERGED).all()
    assert (info.cells.nfe[absent] == 0).all()
    assert (info.cells.residual[absent] == 0).all()
    assert info.converged.all()
    assert (info.outcome == Outcome.CONVERGED).all()
    radius = info.spectral_radius()
    assert (radius[:-1][absent] < 1e-6).all()
    assert (radius[:-1][~absent] > 1e-3).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_present_is_no_mask_at_all(backend: str) -> None:
    layer = layer_of(backend=backend)
    xs = features(layer)
    results = []
    for present in (None, torch.ones(len(xs[0]), N, dtype=torch.bool)):
        z, info = layer(xs, present=present, return_info=True)
        results.append([z, info.fuse.nfe, *torch.autograd.grad(z.sum(), layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_penalty_is_that_of_the_sub_layers(variant: str, backend: str) -> None:
    """For given probes: values and all gradients."""
    layer, present = layer_of(variant=variant, backend=backend), present_rows()
    xs = poisoned(features(layer), present)
    mask = 1.25 * (torch.rand(len(present), DIM, dtype=torch.float64) > 0.2)
    clean = only([x.detach() for x in xs], present.T[..., None])
    absent = ~present.T[..., None]
    states = torch.randn(N + 1, len(present), DIM, dtype=torch.float64)
    states[:-1].masked_fill_(absent, 0.0)
    probes = draw_probes(states, 2)
    probes[:, :-1].masked_fill_(absent, torch.nan)

    def total(xs: list[Tensor], layer: DEQFusion, states: Tensor, probes: Tensor, *masks: object):
        equations = layer._equations()
        params = [*equations.cells, *equations.fuse, equations.weights]
        params += [] if equations.bias is None else [equations.bias]
        how = (2, variant, backend)
        return operators.penalty_layer(probes, states, xs, params, *masks, how)

    given = total(xs, layer, states, probes, mask, present.T[..., None])
    given.backward()
    expected, grads = 0.0, {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    for kept in PATTERNS:
        rows, sub = rows_with(present, kept), sub_layer(layer, kept, variant=variant)
        own = [clean[i].detach()[rows].requires_grad_() for i in kept]
        blocks = [*kept, N]
        some = total(
            own, sub, states[blocks][:, rows], probes[:, blocks][:, :, rows], mask[rows], None
        )
        some.backward()
        expected = expected + some.detach()
        for k, i in enumerate(kept):
            torch.testing.assert_close(xs[i].grad[rows], own[k].grad, rtol=1e-9, atol=1e-9)
        add_gradients(grads, layer, sub, kept)
    assert all((x.grad[gone[:, 0]] == 0).all() for x, gone in zip(xs, absent, strict=True))
    torch.testing.assert_close(given.detach(), expected, rtol=1e-10, atol=0)
    for name, p in layer.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(grad, grads[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("options", [{}, {"gate": False}], ids=["operator", "autograd"])
def test_the_penalty_is_a_mean_over_what_is_present(options: dict) -> None:
    """With the same rows in every pattern it is the weighted mean of the sub-layers' penalties."""
    layer, kept = layer_of(**options), (0, 2)
    present = torch.zeros(200, N, dtype=torch.bool)
    present[:, list(kept)] = True
    torch.manual_seed(3)
    xs = [torch.randn(200, DIM, dtype=torch.float64) for _ in range(N)]
    sub = sub_layer(layer, kept, **options)
    _, info = layer(poisoned(xs, present), present=present, return_info=True)
    _, own = sub([xs[i] for i in kept], return_info=True)
    info.jacobian_penalty().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    with torch.no_grad():
        a, b = info.jacobian_penalty(50), own.jacobian_penalty(50)
    torch.testing.assert_close(a, b, rtol=0.05, atol=0)  # other probes; 50 of them on 200 rows


# ---- transforms of torch -------------------------------------------------------------------------


def test_compiled_without_breaks() -> None:
    layer, present = layer_of(), present_rows()
    xs = poisoned(features(layer), present)

    def step(xs: list[Tensor], present: Tensor) -> Tensor:
        z, info = layer(xs, present=present, return_info=True)
        return z.square().sum() + 0 * info.jacobian_penalty()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plain, fast = step(xs, present), compiled(xs, present)
    torch.testing.assert_close(fast, plain)
    for a, b in zip(*(torch.autograd.grad(v, xs) for v in (plain, fast)), strict=True):
        torch.testing.assert_close(a, b)


def test_exported() -> None:
    layer, present = layer_of().eval(), present_rows()
    xs = features(layer)
    program = torch.export.export(layer, (xs,), {"present": present})
    torch.testing.assert_close(program.module()(xs, present=present), layer(xs, present=present))


def test_mapped() -> None:
    layer = layer_of()
    torch.manual_seed(0)
    xs = torch.randn(3, N, 5, DIM, dtype=torch.float64)
    present = torch.rand(3, 5, N) > 0.4
    present[~present.any(-1)] = True
    mapped = torch.vmap(lambda x, p: layer(list(x), present=p))(xs, present)
    for k in range(3):
        torch.testing.assert_close(mapped[k], layer(list(xs[k]), present=present[k]))
    grads = torch.vmap(torch.func.grad(lambda x, p: layer(list(x), present=p).sum()))(xs, present)
    for k in range(3):
        x = xs[k].clone().requires_grad_()
        (expected,) = torch.autograd.grad(layer(list(x), present=present[k]).sum(), x)
        torch.testing.assert_close(grads[k], expected)


def test_autocast_and_16_bits() -> None:
    layer, present = layer_of().to(torch.bfloat16), present_rows()
    xs = [x.to(torch.bfloat16) for x in poisoned(features(layer), present)]
    z = layer(xs, present=present)
    assert z.dtype == torch.bfloat16
    assert z.isfinite().all()
    layer = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        z = layer([x.float() for x in xs], present=present)
    assert z.isfinite().all()


def test_starts_and_dropout_and_leading_dimensions() -> None:
    layer = layer_of(dropout=0.3, solver=Anderson(tol=1e-10, max_iter=200))
    present = present_rows().reshape(EACH, len(PATTERNS), N)
    xs = [x.reshape(EACH, len(PATTERNS), DIM) for x in features(layer)]
    torch.manual_seed(0)
    z, cells, info = layer(xs, present=present, return_cells=True, return_info=True)
    assert info.cells.outcome.shape == (N, EACH, len(PATTERNS))
    torch.manual_seed(0)
    again, warm = layer(xs, present=present, z0=(z, cells), return_info=True)
    torch.testing.assert_close(again, z, rtol=1e-7, atol=1e-7)
    assert (warm.nfe <= 2).all()


def test_rescued_rows() -> None:
    layer, present = layer_of(init="torch", solver=Anderson(tol=1e-10, max_iter=8)), present_rows()
    _, info = layer(features(layer), present=present, return_info=True)
    assert info.rescued.any()
    assert info.converged.all()


# ---- masks that are wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "kind", "text"),
    [
        ([[True]], TypeError, "present: expected a tensor of torch.bool, got list. Remedy: torch"),
        (torch.ones(3, N), TypeError, r"expected torch.bool, got .*32. Remedy: present.to"),
        (torch.ones(3, N).bool().to_sparse(), TypeError, r"present: .* Remedy: present.to_dense"),
        (torch.ones(3, N - 1).bool(), ValueError, r"present: expected shape \(3, 4\)"),
        (torch.ones(3, N).bool().to("meta"), ValueError, "present: expected device cpu"),
        (torch.tensor([[True] * N, [False] * N, [True] * N]), ValueError,
         "present: expected at least one modality in every row, got none in 1 of 3 rows"),
    ],
)  # fmt: skip
def test_wrong_masks_are_refused_by_name(present: object, kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        layer_of()([torch.randn(3, DIM, dtype=torch.float64)] * N, present=present)


@pytest.mark.parametrize(
    "options",
    [{}, {"gate": False}, {"combine": "sum"}, {"combine": "weighted_sum"}, {"cell": "identity"},
     {"weight_tied_steps": 3}],
    ids=str,
)  # fmt: skip
def test_a_row_with_nothing_is_called_empty(options: dict[str, Any]) -> None:
    layer, present = layer_of(on_failure="ignore", **options), present_rows()[:4].clone()
    present[2] = False

    @torch.compile(backend="eager", fullgraph=True)  # nobody looks at the mask
    def outcome(xs: list[Tensor], present: Tensor) -> Tensor:
        _, info = layer(xs, present=present, return_info=True)
        return info.fuse.outcome

    found = outcome([x[:4] for x in features(layer)], present)
    assert (found == Outcome.EMPTY).tolist() == [False, False, True, False]


def test_a_mask_may_be_used_again_before_the_penalty() -> None:
    layer, present = layer_of(), present_rows()
    found = []
    for spoil in (False, True):
        mask = present.clone()
        _, info = layer(features(layer), present=mask, return_info=True)
        if spoil:
            mask.fill_(True)
        torch.manual_seed(0)
        found.append((info.jacobian_penalty(), info.spectral_radius()))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("number", [-1, 3])
def test_counts_beyond_the_modalities_are_refused(number: int) -> None:
    combine, x = layer_of().combine, torch.randn(2, DIM, dtype=torch.float64)
    counts = torch.tensor([[1], [number]])
    with pytest.raises(ValueError, match="counts: expected 0 to num_modalities = 2, got"):
        functional.solve_fuse(x, x, combine.flat(), num_modalities=2, num_groups=2, counts=counts)


def test_a_row_with_nothing_that_nobody_saw() -> None:
    """Under a transform nobody looks: the row says so itself, and no other one notices."""
    layer, present = layer_of(), present_rows()[:4].clone()
    xs = torch.stack([x[:4] for x in features(layer)])
    expected = layer(list(xs), present=present)
    present[2] = False
    with pytest.warns(UserWarning, match="1 have no modality present"):
        z = torch.vmap(lambda x, p: layer(list(x), present=p), (1, 0))(
            xs[:, :, None], present[:, None]
        )[:, 0]
    others = [0, 1, 3]
    torch.testing.assert_close(z[others], expected[others])
    assert z[2].isnan().all()
