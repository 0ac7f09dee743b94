"""Every step and every equilibrium against the equations of the paper, written naively.

The naive statement and the independent root are in ``deqfuse.testing``; nothing there shares code
with the maps or the solvers under test.
"""

from __future__ import annotations

import math

import pytest
import torch
from parameters import scatter_injection, scatter_norms
from torch import Tensor

from deqfuse import Anderson, DEQFusion, PurifyCombine, ResidualCell, functional, testing
from deqfuse.backends.maps import VARIANTS
from deqfuse.nn import fusion as fusion_module
from deqfuse.nn.cells import dropout_mask

TIGHT = Anderson(tol=1e-13, max_iter=500, rescue=True)
ROOT_ERROR = 1e-10  # two roots at relative residual 1e-12 and 1e-13, condition number below 100
SIZES = [  # d, groups, N, B
    pytest.param(12, 4, 1, 7, id="d12-g4-n1"),
    pytest.param(50, 2, 2, 1, id="d50-g2-n2-one-row"),
    pytest.param(20, 5, 3, 7, id="d20-g5-n3"),
    pytest.param(12, 4, 5, 7, id="d12-g4-n5"),
    pytest.param(12, 4, 4, 0, id="d12-g4-n4-empty"),
]
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(dim: int, num_modalities: int, **options) -> DEQFusion:
    """A float64 layer with scattered norms and weights, contractive in every variant.

    Groups of at least six features: one of three is at times all zero after the relu, where a row
    may have no equilibrium.
    """
    torch.manual_seed(dim * 10 + num_modalities)
    options = {"solver": TIGHT, "num_groups": 2, "injection_norm": False, **options}
    fusion = DEQFusion(dim, num_modalities, **options).double()
    scatter_norms(fusion)
    scatter_injection(fusion)
    return fusion


def features(fusion: DEQFusion, *lead: int) -> list[Tensor]:
    widths = [fusion.dim] * fusion.num_modalities
    if fusion.projections is not None:
        widths = [p.in_features for p in fusion.projections]
    return [torch.randn(*lead, width, dtype=torch.float64) for width in widths]


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).detach().abs().max()) if a.numel() else 0.0


def assert_root(fusion: DEQFusion, xs: list[Tensor], mask: Tensor | None = None) -> None:
    """The layer's output and its cells are the naive root."""
    expected = testing.naive_root(fusion, xs, mask=mask)
    *cells, fused = expected.unbind(1)
    if fusion.combine_kind == "weighted_sum":
        assert distance(fusion(xs).reshape(-1, fusion.dim), fused) <= ROOT_ERROR
        return
    z, zs = fusion(xs, return_cells=True)
    assert z.shape == (*xs[0].shape[:-1], fusion.dim)
    assert zs.shape == (fusion.num_modalities, *z.shape)
    assert distance(z.reshape(-1, fusion.dim), fused) <= ROOT_ERROR
    assert (
        distance(zs.reshape(fusion.num_modalities, -1, fusion.dim), torch.stack(cells))
        <= ROOT_ERROR
    )


# ---- one step ------------------------------------------------------------------------------------


def assert_step(step, naive, module, *tensors) -> None:
    """``step`` is ``naive`` to 1e-12 in float64, and as accurate as it in float32.

    In float32 both make errors of the same origin; ``step`` may be off the float64 truth by four
    times the naive statement's own error, and 16 roundings.
    """
    truth = naive(module, *tensors)
    assert distance(step(module, *tensors), truth) <= 1e-12
    if truth.numel() == 0:
        return
    module, low = module.float(), [None if t is None else t.float() for t in tensors]
    rounded = naive(module.double(), *(None if t is None else t.double() for t in low))
    module = module.float()
    budget = 4 * distance(naive(module, *low), rounded)
    budget += 16 * torch.finfo(torch.float32).eps * float(rounded.detach().abs().max())
    assert distance(step(module, *low), rounded) <= budget


@each_variant
@pytest.mark.parametrize(("dim", "groups", "n", "rows"), SIZES)
def test_cell_step_is_equation_8(dim, groups, n, rows, variant):
    torch.manual_seed(n)
    cell = ResidualCell(dim, num_groups=groups, variant=variant, init="torch").double()
    scatter_norms(cell)
    z, x = torch.randn(2, rows, dim, dtype=torch.float64)
    assert_step(lambda m, *t: m(*t), testing.naive_cell, cell, z, x)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
@each_variant
@pytest.mark.parametrize(("dim", "groups", "n", "rows"), SIZES)
def test_combine_step_is_equations_9_to_12(dim, groups, n, rows, variant, gate, masked):
    torch.manual_seed(n)
    options = {"num_groups": groups, "variant": variant, "gate": gate, "init": "torch"}
    combine = PurifyCombine(dim, n, **options).double()
    scatter_norms(combine)
    z, x_fuse = torch.randn(2, rows, dim, dtype=torch.float64)
    cells = torch.randn(n, rows, dim, dtype=torch.float64)
    mask = dropout_mask(z, 0.3) if masked else None
    assert_step(lambda m, *t: m(*t), testing.naive_combine, combine, z, cells, x_fuse, mask)


# ---- the equilibrium -----------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize(("dim", "groups", "n", "rows"), SIZES)
def test_equilibrium_is_the_naive_root(dim, groups, n, rows, variant):
    fusion = make(dim, n, num_groups=groups, variant=variant, on_failure="ignore")
    xs = features(fusion, rows)
    found = fusion(xs, return_info=True)[1].converged
    assert found.sum() >= 0.7 * rows
    assert_root(fusion, [x[found] for x in xs])


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 0)], ids=str)
def test_leading_dimensions(lead):
    fusion = make(12, 2)
    assert_root(fusion, features(fusion, *lead))


@pytest.mark.parametrize(
    "options",
    [
        {"in_dims": [5, 12, 31]},
        {"injection_norm": True},
        {"in_dims": [5, 12, 31], "injection_norm": True, "variant": "released"},
        {"cell": "identity"},
        {"cell": "identity", "variant": "released-mmimdb"},
        {"combine": "sum"},
        {"combine": "sum", "variant": "released"},
        {"combine": "sum", "cell": "identity"},
        {"combine": "weighted_sum"},
        {"combine": "weighted_sum", "variant": "released"},
        {"gate": False},
        {"gate": False, "variant": "released-mmimdb"},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_options_and_ablations(options):
    fusion = make(12, 3, **options)
    assert_root(fusion, features(fusion, 4))


def test_injection_norm_removes_the_scale_of_the_inputs():
    fusion = make(12, 2, injection_norm=True)
    xs = features(fusion, 3)
    louder = [x * factor for x, factor in zip(xs, (100.0, 30.0), strict=True)]
    assert distance(fusion(louder), fusion(xs)) < 1e-10
    assert distance(make(12, 2)(louder), make(12, 2)(xs)) > 0.1


def test_rows_of_zeros_get_no_gradient_from_the_injection_norm():
    """Their size is no number to divide by: the gradient would be a million million times g."""
    fusion = make(12, 2, injection_norm=True, on_failure="ignore")
    xs = [x.requires_grad_() for x in features(fusion, 3)]
    with torch.no_grad():
        xs[0][1] = 0.0
    fusion(xs).square().sum().backward()
    assert xs[0].grad[1].eq(0).all()
    assert xs[0].grad[0].ne(0).any()
    assert xs[1].grad.isfinite().all()


def weight_tied(fusion: DEQFusion, xs: list[Tensor], steps: int) -> tuple[Tensor, list[Tensor]]:
    """Eqs. 8-12 from zero; the combination of a step sees the cells of that step."""
    x, x_fuse = testing.naive_injections(fusion, xs)
    z, zs = torch.zeros_like(x_fuse), [torch.zeros_like(x_fuse)] * fusion.num_modalities
    for _ in range(steps):
        zs = [testing.naive_cell(*args) for args in zip(fusion.cells, zs, x.unbind(1), strict=True)]
        z = testing.naive_combine(fusion.combine, z, zs, x_fuse)
    return z, zs


@each_variant
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_weight_tied_steps_are_interleaved_naive_steps(steps, variant):
    fusion = make(12, 3, weight_tied_steps=steps, variant=variant)
    xs = features(fusion, 4)
    z, zs, info = fusion(xs, return_cells=True, return_info=True)
    expected, cells = weight_tied(fusion, xs, steps)
    assert distance(z, expected) <= 1e-12
    assert distance(zs, torch.stack(cells)) <= 1e-12
    assert (info.fuse.nfe == steps).all()
    cotangent = torch.randn_like(z)
    names, params = zip(*fusion.named_parameters(), strict=True)
    given = torch.autograd.grad(z, params, cotangent, allow_unused=True, materialize_grads=True)
    exact = torch.autograd.grad(
        expected, params, cotangent, allow_unused=True, materialize_grads=True
    )
    for name, a, b in zip(names, given, exact, strict=True):
        assert distance(a, b) <= 1e-11, name
        # In the first step the gate multiplies z_f = 0: nothing reaches cells, gate and W_f.
        if steps == 1 and (
            name.startswith(("cells", "combine.gate")) or name == "combine.fuse.weight"
        ):
            assert not a.any(), name
        elif (name, variant) == ("injection_bias", "released-mmimdb"):
            assert a.abs() <= 1e-12, name  # a constant, which the norm takes out: rounding is left
        else:
            assert a.any(), name


# ---- dropout -------------------------------------------------------------------------------------


def test_dropout_mask_statistics():
    torch.manual_seed(0)
    p, count = 0.3, 100_000
    mask = dropout_mask(torch.empty(count // 10, 10), p)
    assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    sigma = math.sqrt(p * (1 - p) / count)
    assert abs(float((mask == 0).double().mean()) - p) < 5 * sigma


@each_variant
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
def test_dropout_draws_one_mask_per_solve(monkeypatch, variant, gate):
    drawn = []

    def recorded(like: Tensor, p: float) -> Tensor:
        drawn.append(dropout_mask(like, p))
        return drawn[-1]

    monkeypatch.setattr(fusion_module, "dropout_mask", recorded)
    fusion = make(12, 3, dropout=0.4, variant=variant, gate=gate)
    xs = features(fusion, 4)
    fusion.train()
    z = fusion(xs)
    assert len(drawn) == 1
    expected = testing.naive_root(fusion, xs, mask=drawn[0])[:, -1]
    assert distance(z, expected) <= ROOT_ERROR
    assert distance(fusion(xs), z) > 1e-3  # the next solve has another mask
    fusion.eval()
    assert_root(fusion, xs)
    assert len(drawn) == 2


# ---- parameters ----------------------------------------------------------------------------------

CELL = [f"{part}.{leaf}" for part in ("linear1", "linear2", "norm1", "norm2", "norm3")
        for leaf in ("weight", "bias")]  # fmt: skip
CELLS = [f"cells.{i}.{name}" for i in range(2) for name in CELL]
GATE = ["combine.gate.weight", "combine.gate.bias"]
FUSE = ["combine.fuse.weight", "combine.fuse.bias", "combine.norm.weight", "combine.norm.bias"]
PROJECTIONS = [f"projections.{i}.{leaf}" for i in range(2) for leaf in ("weight", "bias")]
WEIGHTS, BIAS = ["modality_weights"], ["injection_bias"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, CELLS + GATE + FUSE + WEIGHTS),
        ({"variant": "released"}, CELLS + GATE + FUSE + WEIGHTS + BIAS),
        ({"variant": "released-mmimdb"}, CELLS + GATE + FUSE + WEIGHTS + BIAS),
        ({"in_dims": [3, 4]}, PROJECTIONS + CELLS + GATE + FUSE + WEIGHTS),
        ({"injection_norm": True, "dropout": 0.1}, CELLS + GATE + FUSE + WEIGHTS),
        ({"cell": "identity"}, GATE + FUSE + WEIGHTS),
        ({"gate": False}, CELLS + FUSE + WEIGHTS),
        ({"combine": "sum", "variant": "released"}, CELLS),
        ({"combine": "weighted_sum"}, WEIGHTS),
        ({"combine": "weighted_sum", "variant": "released"}, WEIGHTS + BIAS),
        ({"combine": "sum", "cell": "identity"}, []),
        ({"weight_tied_steps": 3}, CELLS + GATE + FUSE + WEIGHTS),
    ],
    ids=str,
)
def test_parameter_names(options, names):
    fusion = DEQFusion(8, 2, **options)
    assert sorted(name for name, _ in fusion.named_parameters()) == sorted(names)
    assert list(fusion.buffers()) == []


def test_parameter_shapes():
    fusion = DEQFusion(8, 3, in_dims=[2, 3, 4], variant="released")
    shapes = {name: tuple(p.shape) for name, p in fusion.named_parameters()}
    assert shapes["modality_weights"] == (3,)
    assert shapes["injection_bias"] == (1,)
    assert shapes["projections.1.weight"] == (8, 3)
    assert {shapes[f"cells.2.{n}"] for n in CELL if n.endswith("bias")} == {(8,)}
    assert shapes["combine.gate.weight"] == shapes["cells.0.linear2.weight"] == (8, 8)


def test_contractive_init_statistics():
    torch.manual_seed(0)
    d, n = 256, 3
    fusion = DEQFusion(d, n)
    expected = {
        "cells.1.linear2.weight": 0.1 / math.sqrt(d),
        "combine.fuse.weight": 0.1 / math.sqrt(d),
        "combine.gate.weight": 0.25 / (n * math.sqrt(d)),
        "cells.1.linear1.weight": 1 / math.sqrt(3 * d),  # torch's uniform(-1, 1) / sqrt(d)
    }
    for name, std in expected.items():
        # The standard error of a standard deviation is sigma / sqrt(2 count).
        weight = fusion.get_parameter(name)
        assert float(weight.detach().std()) == pytest.approx(std, rel=5 / math.sqrt(2 * d * d)), (
            name
        )
        assert abs(float(weight.detach().mean())) < 5 * std / d, name
    assert torch.equal(fusion.modality_weights, torch.ones(n))
    for cell in fusion.cells:
        for norm in (cell.norm1, cell.norm2, cell.norm3):
            assert torch.equal(norm.weight, torch.ones(d))
            assert torch.equal(norm.bias, torch.zeros(d))


def test_torch_init_is_torchs_own():
    torch.manual_seed(0)
    d = 64
    fusion = DEQFusion(d, 2, init="torch")
    for name in ("cells.0.linear2.weight", "combine.fuse.weight", "combine.gate.weight"):
        weight = fusion.get_parameter(name).detach().abs()
        assert 0.99 / math.sqrt(d) < float(weight.max()) <= 1 / math.sqrt(d), name


# ---- storage in 16 bits --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bit_storage_solves_in_float32(dtype):
    """Solve and gradient are those of float32 with the stored values; gradients are rounded."""
    torch.manual_seed(0)
    fusion = DEQFusion(12, 2).to(dtype)
    x, cotangent = torch.randn(2, 5, 12).to(dtype).requires_grad_(), torch.randn(2, 5, 12)
    flat = [t for cell in fusion.cells for t in cell.flat()]
    z, _, _ = functional.solve_cells(x, flat)
    wide_x = x.detach().float().requires_grad_()
    wide = [t.detach().float().requires_grad_() for t in flat]
    expected, _, _ = functional.solve_cells(wide_x, wide)
    assert z.dtype == torch.float32
    assert torch.equal(z, expected)
    given = torch.autograd.grad(z, [x, *flat], cotangent)
    exact = torch.autograd.grad(expected, [wide_x, *wide], cotangent)
    for a, b in zip(given, exact, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@each_variant
def test_sixteen_bit_layer_is_close_to_float32(dtype, variant):
    """Within four times what rounding the injections would cost, and the output's rounding."""
    fusion = make(12, 3, variant=variant, solver=Anderson(tol=1e-6))
    fusion = fusion.to(dtype)
    xs = [x.to(dtype) for x in features(fusion, 5)]
    z = fusion(xs)
    assert z.dtype == dtype
    wide, eps = fusion.double(), torch.finfo(dtype).eps
    truth = wide([x.double() for x in xs])
    shaken = wide([x.double() * (1 + eps * torch.randn_like(x.double())) for x in xs])
    budget = 4 * distance(shaken, truth) + eps * float(truth.detach().abs().max())
    assert distance(z, truth) <= budget
    assert budget < 0.3 * float(truth.detach().abs().max())  # or the comparison would mean nothing
