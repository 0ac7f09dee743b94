"""The Jacobian penalty in closed form: the C++ operator and the reference."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import Case, assert_equal, named
from cpu_layer_cases import each_variant, flat, layer_of
from penalty_cases import Penalty, assert_near, double_backward, inputs

from deqfuse.backends import cpu_adjoint, cpu_native, reference
from deqfuse.backends.maps import VARIANTS
from deqfuse.backends.penalty import draw_probes

BACKENDS = {"cpu": cpu_adjoint, "reference": reference}
each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)

GRID = [
    *(Case(9, d, g, variant=v) for d, g in ((12, 1), (12, 2), (20, 4)) for v in VARIANTS),
    *(Case(5, d, g, 3, v) for d, g in ((33, 3), (35, 5), (35, 7), (66, 2)) for v in VARIANTS),
    *(Case(r, 12, 2, variant="released") for r in (1, 4, 15, 16, 17, 33, 70)),
    *(Case(7, 20, 4, n, "released-mmimdb") for n in (1, 3, 6)),
    Case(300, 12, 2, 1, "released"),  # factors of the weights' gradients in two parts
]
PAIRS = [Case(9, d, d // 2, variant=v) for d in (12, 20) for v in VARIANTS]


@each_backend
@pytest.mark.parametrize("case", **named(GRID))
def test_value_and_gradients_are_those_of_a_double_backward(case, backend):
    """A few hundred roundings of 1e-16 each, and norms that cancel up to three digits."""
    for probes, mask in ((1, False), (3, True)):
        given = inputs(case, probes, mask)
        assert_near(given.call(backend), double_backward(given), 1e-10)


@each_backend
@pytest.mark.parametrize("case", **named(PAIRS))
def test_groups_of_two_features(case, backend):
    """Normalised, these are +-1 up to eps / var: S cancels var / eps, here up to 1e6, of what it is
    applied to, in autograd as well as here. Of sixteen digits ten are left, of a square nine."""
    for probes, mask in ((1, False), (3, True)):
        given = inputs(case, probes, mask)
        assert_near(given.call(backend), double_backward(given), 1e-8)


@each_variant
def test_a_seed_draws_the_probes_that_a_record_draws(variant):
    """In their order: the scalar is what ``info.jacobian_penalty`` computes from the same seed."""
    case = Case(7, 12, 2, 3, variant)
    layer = layer_of(case)
    xs = list(case.draw(case.n))
    z, zs, info = layer(xs, return_cells=True, return_info=True)
    states = torch.cat([zs, z[None]]).detach()
    for probes in (1, 3):
        torch.manual_seed(5)
        expected = info.jacobian_penalty(probes)
        torch.manual_seed(5)
        v = draw_probes(states, probes)
        params = [t.detach() for t in flat(layer)]
        for backend in BACKENDS.values():
            how = (None, layer.num_groups, VARIANTS[variant], False)
            value, _, none = backend.penalty_layer(v, states, xs, params, *how)
            torch.testing.assert_close(value.sum() / v.numel(), expected.detach())
            assert none == []


FLOAT_SIZES = [(1, 12, 2), (15, 20, 2), (33, 33, 3), (70, 50, 2), (40, 300, 4), (257, 768, 4)]
FLOAT_SIZES += [
    (64, 126, 2),
    (64, 128, 2),
    (17, 259, 7),
]  # around kRoughFrom, an odd rest of a segment


def parts(found: Penalty) -> list[torch.Tensor]:
    """Value, gradients of the injections and of the parameters: each of a size of its own."""
    kinds = ([found[0]], found[1], found[2])
    return [torch.cat([t.double().flatten() for t in kind]) for kind in kinds]


def distance(found: Penalty, wanted: Penalty) -> float:
    """The largest relative error of value, dx and dparams, in their norms."""
    pairs = zip(parts(found), parts(wanted), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def error_of_a_rough_product(dim: int) -> float:
    """Relative root mean square. 16-bit integers: a row of the matrix and one of the batch, whose
    256 features of a segment have the norm 32700, are rounded by sqrt(1 / 12) each feature. Two
    bfloat16 pieces of three: csrc/README.md."""
    name = cpu_native.module.build_info()["instruction_set"]
    if name == "vnni" and dim >= 128:
        return math.sqrt(2 * min(dim, 256) / 12) / 32700
    return 2e-5 if name == "amx" else 0.0


@each_variant
@pytest.mark.parametrize(("rows", "dim", "groups"), FLOAT_SIZES)
def test_float32_is_as_exact_as_torchs(rows, dim, groups, variant):
    """Against float64: no further away than the reference in float32, whatever unit multiplies,
    and where that leaves out digits five times the error of such a product: the longest chain is
    two products to J^T v, two on the way back and one through the evaluation, and its factors'
    relative errors add up. (Where no digits are left out this is the old limit.)"""
    low = inputs(Case(rows, dim, groups, 1, variant, "f32"), mask=True)
    exact = low.to(torch.float64).call(cpu_adjoint)
    limit = max(3 * distance(low.call(reference), exact), 1e-6)
    assert distance(low.call(cpu_adjoint), exact) <= limit + 5 * error_of_a_rough_product(dim)


@each_variant
@pytest.mark.parametrize("dim", [128, 512])
def test_left_out_digits_drown_in_the_noise_of_the_probes(dim, variant):
    """What other probes change in the mean over a batch, value and gradients, is far more."""
    given = inputs(Case(64, dim, 4, 1, variant, "f32"))
    other = dataclasses.replace(given, probes=draw_probes(given.states, 1))
    exact = given.to(torch.float64).call(cpu_adjoint)
    assert 100 * distance(given.call(cpu_adjoint), exact) < distance(other.call(cpu_adjoint), exact)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_a_row_depends_on_nothing_but_itself(dtype):
    """Tiles of every width, and lanes without a row."""
    for case in (Case(130, 20, 4, 2, "released", dtype), Case(257, 768, 4, 1, dtype=dtype)):
        given = inputs(case, 2, mask=True)
        value, dx, _ = given.call(cpu_adjoint)
        for rows in (slice(0, 1), slice(60, 67), slice(case.rows - 5, None), slice(0, 64)):
            alone = given.call(cpu_adjoint, rows=rows)
            assert_equal([alone[0], *alone[1]], [value[:, rows], *(t[rows] for t in dx)])


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("probes", [1, 2])
def test_nothing_depends_on_the_thread_count(dtype, probes, threads):
    """With the threads the rows that are taken at once change, too."""
    for case in (Case(33, 20, 4, 3, "released", dtype), Case(1200, 12, 2, 1, "paper", dtype)):
        given, found = inputs(case, probes), []
        for count in (1, 2, 7, 64):
            threads(count)
            value, dx, grads = given.call(cpu_adjoint)
            found.append([value, *dx, *grads])
        for other in found[1:]:
            assert_equal(other, found[0])


@each_backend
@each_variant
def test_without_the_parameters_gradients_the_rest_is_the_same(variant, backend):
    given = inputs(Case(33, variant=variant), 2, mask=True)
    value, dx, _ = given.call(backend)
    alone = given.call(backend, want_params=False)
    assert_equal([alone[0], *alone[1]], [value, *dx])
    assert alone[2] == []


@each_backend
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_row_of_nan_stays_alone(block, backend):
    """Of a cell it reaches the fuse step, through the sum of the cells; of that, no cell."""
    case = Case(35, 20, 4, variant="released")
    given = inputs(case)
    value, dx, _ = given.call(backend)
    states = given.states.clone()
    states[block, 16, 3] = torch.nan
    poisoned = dataclasses.replace(given, states=states).call(backend)
    blocks = [block] if block == case.n else [block, case.n]
    assert poisoned[0].isnan().nonzero().tolist() == [[b, 16] for b in blocks]
    others = [r for r in range(case.rows) if r != 16]
    assert_equal([poisoned[0][:, others]], [value[:, others]])
    assert_equal([d[others] for d in poisoned[1]], [d[others] for d in dx])
    assert all(poisoned[2][10 * b].isnan().any() for b in blocks)  # sums over rows keep it


@each_backend
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_what_is_stored_in_16_bits_is_computed_in_32(dtype, backend):
    """Gradients come in float32: a sum over all rows is to be scaled before it is stored."""
    stored = inputs(Case(20, variant="released", dtype=dtype), mask=True)
    states, probes = stored.states.float(), stored.probes.float()
    stored = dataclasses.replace(stored, states=states, probes=probes)
    value, dx, grads = stored.call(backend)
    wanted = stored.to(torch.float32).call(backend)
    assert_equal([value, *dx, *grads], [wanted[0], *wanted[1], *wanted[2]])
    assert {t.dtype for t in (value, *dx, *grads)} == {torch.float32}


@each_backend
def test_no_rows(backend):
    value, dx, grads = inputs(Case(0, variant="released")).call(backend)
    assert value.shape == (3, 0)
    assert all(d.shape == (0, 12) for d in dx)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("rows", [3, 0])
def test_opcheck(rows):
    given = inputs(Case(rows, variant="released", dtype="f32"), mask=True)
    params = [t.detach().bfloat16() for t in flat(given.layer)]
    for want in (True, False):
        operands = given.probes, given.states, given.xs, params, want, given.mask, None
        call = (*operands, 2, True, False)
        utils = ["test_schema", "test_faketensor"]
        found = torch.library.opcheck(cpu_native.penalty_layer, call, test_utils=utils)
        assert set(found.values()) == {"SUCCESS"}


def test_wrong_sizes_are_refused_by_the_kernel():
    given = inputs(Case(5, variant="released"), mask=True)
    params = [t.detach() for t in flat(given.layer)]
    tensors = {"probes": given.probes, "states": given.states, "x": given.xs, "params": params}
    tensors |= {"mask": given.mask, "present": torch.ones(2, 5, 1, dtype=torch.bool)}
    refused = 0

    def run(probes, states, x, params, mask, present) -> None:
        cpu_native.penalty_layer(probes, states, x, params, True, mask, present, 2, True, False)

    run(**tensors)
    for name, value in tensors.items():
        for k, right in enumerate(value) if isinstance(value, list) else [(None, value)]:
            wrong = right[..., 1:] if right.dim() != 3 else right[:-1]
            broken = wrong if k is None else [*value[:k], wrong, *value[k + 1 :]]
            with pytest.raises(RuntimeError, match="contiguous values of the compute"):
                run(**{**tensors, name: broken})
            refused += 1
    assert refused == 4 + 2 + len(params)
    with pytest.raises(RuntimeError, match="expected at least one, got none"):
        run(**{**tensors, "probes": given.probes[:0]})
    with pytest.raises(RuntimeError, match="got 3 and 3 dimensions"):
        run(**{**tensors, "probes": given.probes[0]})


PROGRAM = """
import json, sys, torch
from deqfuse.backends import cpu_adjoint, cpu_native
torch.set_num_threads(1)
calls = torch.load(sys.argv[1], weights_only=False)
torch.save([cpu_adjoint.penalty_layer(*call) for call in calls], sys.argv[2])
print(json.dumps(cpu_native.module.build_info()))
"""


@pytest.mark.parametrize("name", ["base", "avx2", "avx512", "vnni", "amx"])
def test_instruction_sets_agree(name, tmp_path: Path):
    """Float32 against the same in float64: each within what test_float32 allows of the other."""
    calls, answers, limits = [], [], []
    for variant, dtype, (dim, groups) in itertools.product(
        VARIANTS, ("f64", "f32"), ((20, 4), (35, 5), (132, 4))
    ):
        given = inputs(Case(37, dim, groups, variant=variant, dtype=dtype), 2, mask=True)
        params = [t.detach() for t in flat(given.layer)]
        how = (groups, VARIANTS[variant], True)
        call = (given.probes, given.states, given.xs, params, given.mask, *how)
        calls.append(call)
        answers.append(given.call(cpu_adjoint))
        limits.append(1e-10 if dtype == "f64" else 1e-3)
    torch.save(calls, tmp_path / "calls")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "calls", tmp_path / "answers"],
        env={**os.environ, "DEQFUSE_ISA": name},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    used = json.loads(run.stdout)["instruction_set"]
    if used != name:
        pytest.skip(f"DEQFUSE_ISA={name}: this processor gets {used}")
    found = torch.load(tmp_path / "answers")
    for given, wanted, limit in zip(found, answers, limits, strict=True):
        assert_near(given, wanted, limit)
