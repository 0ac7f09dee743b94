"""Rows that lack modalities in the C++ kernels: their bits, and that they are one call.

The contract itself, in float64: ``tests/layer/test_presence.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from cpu_cases import DTYPES, Case, assert_equal
from cpu_layer_cases import flat, layer_of
from presence_cases import PATTERNS, N, sub_layer
from torch import Tensor

from deqfuse import Anderson, DEQFusion, Implicit, Neumann, OneStep
from deqfuse.backends import cpu, cpu_adjoint, presence
from deqfuse.backends.backend import Launchers
from deqfuse.backends.maps import VARIANTS
from deqfuse.backends.penalty import draw_probes

both_variants = pytest.mark.parametrize("variant", ["paper", "released"])
GATHERED = dataclasses.replace(
    cpu.BACKEND, solve_present=None, adjoint_present=None, penalty_present=None
)

DEFAULT = Implicit(tol=1e-6)


class Found(NamedTuple):
    """A step with the penalty, by what it is of: all blocks, the features, the parameters."""

    blocks: list[Tensor]  # (N + 1, B, ...)
    features: list[Tensor]  # (N, B, d)
    params: list[Tensor]

    def every(self) -> list[Tensor]:
        return [*self.blocks, *self.features, *self.params]


class Rows(NamedTuple):
    """All that a step is given beside parameters; of absent cells NaN wherever there can be."""

    x: Tensor  # (N, B, d)
    g: Tensor  # (N + 1, B, d)
    probes: Tensor  # (K, N + 1, B, d)
    mask: Tensor  # (B, d)
    present: Tensor | None  # (N, B, 1)

    def some(self, rows: Any, kept: list[int] | None = None) -> Rows:
        """Of these rows, all of which have the modalities ``kept``; without, as they are."""
        at = list(range(len(self.x))) if kept is None else kept
        blocks = [*at, len(self.x)]
        present = self.present[:, rows] if self.present is not None and kept is None else None
        x, g = self.x[at][:, rows], self.g[blocks][:, rows]
        return Rows(x, g, self.probes[:, blocks][:, :, rows], self.mask[rows], present)


def rows_of(case: Case, present: Tensor) -> Rows:
    """``present``: (B, N)."""
    torch.manual_seed(3)
    absent = ~present.T[..., None]
    blocks = torch.cat([absent, torch.zeros_like(absent[:1])])
    g, mask = case.draw(case.n + 1), 1.25 * (case.draw() > -0.8)
    probes = torch.stack([draw_probes(g, 1)[0].masked_fill(blocks, torch.nan) for _ in range(2)])
    x = case.draw(case.n).masked_fill(absent, torch.nan)
    mask = mask.to(DTYPES[case.dtype])
    return Rows(x, g.masked_fill(blocks, torch.nan), probes, mask, ~absent)


def step(
    layer: DEQFusion,
    rows: Rows,
    adjoint: Any = DEFAULT,
    backend: Any = cpu.BACKEND,
    want_params: bool = True,
) -> Found:
    params, x = [t.detach() for t in flat(layer)], list(rows.x)
    how = layer.num_groups, VARIANTS[layer.variant]
    launch = presence.whole(backend)
    # Solves are compared elsewhere: all begin with the same equilibria.
    found = presence.whole(cpu.BACKEND).solve(
        x, params, rows.mask, None, None, rows.present, *how, Anderson(rescue=False)
    )
    operands = x, params, rows.mask, rows.present
    dx, grads, statistics = launch.adjoint(
        rows.g[-1], rows.g[:-1], found.states, *operands, *how, adjoint, want_params
    )
    value, dx_penalty, more = presence.penalty_layer(
        backend, rows.probes, found.states, *operands, *how, want_params
    )
    blocks = [found.states, found.residual, found.nfe, *statistics[:3], value]
    return Found(blocks, [torch.stack(dx), torch.stack(dx_penalty)], [*grads, *more])


def mixed(rows: int, n: int, nothing: bool = False) -> Tensor:
    """(B, n) any modalities in any row; ``nothing``: some rows without any."""
    present = torch.rand(rows, n, generator=torch.Generator().manual_seed(rows)) > 0.5
    if not nothing:
        present[~present.any(1), 0] = True
    return present


@both_variants
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_bits_of_a_row_are_those_of_its_own_layer(variant: str, dtype: str) -> None:
    """Values, statistics and gradients of the features; in tiles of another width."""
    case = Case(90, 12, 2, N, variant, dtype)
    layer, present = layer_of(case), torch.zeros(90, N, dtype=torch.bool)
    for r in range(90):
        present[r, list(PATTERNS[r * 7 % 15])] = True
    given = rows_of(case, present)
    found = step(layer, given)
    for number, kept in enumerate(PATTERNS):
        at, blocks = [r for r in range(90) if r * 7 % 15 == number], [*kept, N]
        own = step(sub_layer(layer, kept, variant=variant), given.some(at, list(kept)))
        assert_equal(own.blocks, [t[blocks][:, at] for t in found.blocks])
        assert_equal(own.features, [t[list(kept)][:, at] for t in found.features])
        gone = [i for i in range(N) if i not in kept]
        for t in (*found.blocks, *found.features):
            assert (t[gone][:, at] == 0).all()
    assert all(t.isfinite().all() for t in found.params)


@both_variants
def test_bits_of_the_parameters_gradients_are_those_of_the_sub_layer(variant: str) -> None:
    """Where all rows have the same modalities: in any other batch sums over rows run over others,
    in another order."""
    case = Case(70, 12, 2, N, variant, "f32")
    layer = layer_of(case)
    for kept in PATTERNS[:-1]:
        present = torch.zeros(70, N, dtype=torch.bool)
        present[:, list(kept)] = True
        given = rows_of(case, present)
        found = step(layer, given)
        own = step(sub_layer(layer, kept, variant=variant), given.some(slice(None), list(kept)))
        half = len(found.params) // 2  # the adjoint's, then the penalty's
        for k in (0, 1):
            mine, its = (
                p[k * len(p) // 2 : (k + 1) * len(p) // 2] for p in (found.params, own.params)
            )
            cells = [mine[10 * i + j] for i in kept for j in range(10)]
            others = [*mine[10 * N : 10 * N + 6], mine[10 * N + 6][list(kept)], *mine[10 * N + 7 :]]
            assert_equal([*cells, *others], its)
            for i in set(range(N)) - set(kept):
                assert all((t == 0).all() for t in mine[10 * i : 10 * i + 10])
                assert mine[10 * N + 6][i] == 0
        assert half == 10 * N + 7 + (variant == "released")


SIZES = [
    Case(130, 20, 4, 3, "released", "f32"),
    Case(70, 132, 4, 2, "paper", "f32"),  # products in fewer digits
    Case(257, 768, 4, 2, "paper", "f32"),  # tiles of four vectors; one block at a time
    Case(40, 20, 4, 3, "paper", "f64"),
]
each_size = pytest.mark.parametrize("case", SIZES, ids=lambda c: f"{c.rows},{c.dim},{c.dtype}")


@each_size
def test_a_row_depends_on_nothing_but_itself(case: Case) -> None:
    layer, given = layer_of(case), rows_of(case, mixed(case.rows, case.n))
    found = step(layer, given)
    for rows in (slice(0, 1), slice(20, 37), slice(case.rows - 5, None)):
        alone = step(layer, given.some(rows))
        for a, b in ((alone.blocks, found.blocks), (alone.features, found.features)):
            assert_equal(a, [t[:, rows] for t in b])


@each_size
def test_nothing_depends_on_the_thread_count(case: Case, threads: Any) -> None:
    layer, given, found = layer_of(case), rows_of(case, mixed(case.rows, case.n)), []
    for count in (1, 2, 7):
        threads(count)
        found.append(step(layer, given).every())
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


@pytest.mark.parametrize(
    "adjoint",
    [Implicit(tol=1e-11, max_iter=300), Neumann(3), OneStep(), Implicit(tol=1e-11, max_iter=2)],
    ids=["anderson", "neumann", "one step", "factors"],
)
@pytest.mark.parametrize("want_params", [True, False])
def test_the_call_is_what_gathered_rows_give(adjoint: Any, want_params: bool) -> None:
    """Also rows with nothing, and those that LU factors solve, where each counts its modalities."""
    case = Case(50, 20, 4, 3, "released")
    layer, given = layer_of(case), rows_of(case, mixed(50, 3, nothing=True))
    assert not given.present.any(0).all()
    found, expected = (step(layer, given, adjoint, b, want_params) for b in (cpu.BACKEND, GATHERED))
    assert len(found.params) == (2 * (10 * 3 + 8) if want_params else 0)
    for a, b in zip(found.every(), expected.every(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert_equal(found.blocks[3:6], expected.blocks[3:6])
    assert all(t.isfinite().all() for t in (*found.features, *found.params))


@both_variants
def test_a_full_mask_in_the_kernels_is_no_mask(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What compiled calls and whoever does not look at the mask take; solves included."""
    case = Case(70, 12, 2, 3, variant)
    layer, given = layer_of(case), rows_of(case, torch.ones(70, 3, dtype=torch.bool))
    expected = step(layer, given._replace(present=None))
    monkeypatch.setattr(presence, "_complete", lambda present: present is None)
    assert_equal(step(layer, given).every(), expected.every())


def test_nothing_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*what: Any) -> None:
        raise AssertionError("single blocks ran")

    for name in ("of_cells", "of_fuse"):
        monkeypatch.setattr(f"deqfuse.backends.penalty.{name}", fails)
    none = Launchers(fails, fails)
    alone = dataclasses.replace(cpu.BACKEND, cells=none, fuse=none, layer=none, penalty=fails)
    case = Case(20, 12, 2, 3)
    given, layer = rows_of(case, mixed(20, 3)), layer_of(case)
    assert_equal(step(layer, given, backend=alone).every(), step(layer, given).every())


@pytest.mark.parametrize("stored", ["bf16", "f16"])
def test_16_bits(stored: str) -> None:
    """Computed in float32; gradients of the adjoint come as they are stored."""
    case = Case(30, 20, 4, 3, "released", stored)
    given, layer = rows_of(case, mixed(30, 3)), layer_of(case)
    high = Rows(*(t.float() for t in given[:4]), given.present)
    low, wanted = step(layer, given), step(layer.float(), high)
    dtype = DTYPES[stored]
    assert_equal(low.blocks, wanted.blocks)
    assert_equal(low.features, [wanted.features[0].to(dtype), wanted.features[1]])


def test_masks_of_wrong_sizes_are_refused_by_the_kernels() -> None:
    case = Case(5, 12, 2, 3)
    given, layer = rows_of(case, mixed(5, 3)), layer_of(case)
    for wrong in (given.present[1:], given.present[:, 1:], given.present.to(torch.uint8)):
        params, how = [t.detach() for t in flat(layer)], (2, VARIANTS["paper"])
        operands = list(given.x), params, given.mask, wrong, *how
        calls = (
            lambda o=operands: cpu_adjoint.adjoint_present(
                given.g[-1], None, given.g, *o, Implicit(tol=1e-6), True
            ),
            lambda o=operands: cpu_adjoint.penalty_present(given.probes, given.g, *o, True),
        )
        for call in calls:
            with pytest.raises(RuntimeError, match="present: expected 15 contiguous values"):
                call()
