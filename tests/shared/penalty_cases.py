"""Problems that the tests of the Jacobian penalty share, and its definition by autograd."""

from __future__ import annotations

import dataclasses

import torch
from cpu_cases import DTYPES, Case
from cpu_layer_cases import flat, layer_of
from torch import Tensor

from deqfuse import DEQFusion, testing
from deqfuse.backends.maps import VARIANTS
from deqfuse.backends.penalty import draw_probes

Penalty = tuple[Tensor, list[Tensor], list[Tensor]]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A call; the states need not be equilibria, since the penalty holds them constant."""

    layer: DEQFusion
    probes: Tensor
    states: Tensor
    xs: list[Tensor]
    mask: Tensor | None

    def call(self, backend, want_params: bool = True, rows: slice = slice(None)) -> Penalty:
        mask, layer = self.mask, self.layer
        return backend.penalty_layer(
            self.probes[:, :, rows], self.states[:, rows], [x[rows] for x in self.xs],
            [t.detach() for t in flat(layer)], None if mask is None else mask[rows],
            layer.num_groups, VARIANTS[layer.variant], want_params,
        )  # fmt: skip

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype."""
        layer = layer_like(self.layer).to(dtype)
        mask = None if self.mask is None else self.mask.to(dtype)
        xs = [x.to(dtype) for x in self.xs]
        return Inputs(layer, self.probes.to(dtype), self.states.to(dtype), xs, mask)


def layer_like(layer: DEQFusion) -> DEQFusion:
    """The same equations with parameters of its own."""
    twin = DEQFusion(
        layer.dim, layer.num_modalities, num_groups=layer.num_groups, variant=layer.variant,
        injection_norm=layer.injection_norm,
    )  # fmt: skip
    twin.load_state_dict(layer.state_dict())
    return twin


def inputs(case: Case, probes: int = 1, mask: bool = False) -> Inputs:
    """Drawn in float32 and given in the case's dtype, so that both can have the same numbers."""
    layer = layer_of(dataclasses.replace(case, dtype="f32"), init="torch")
    torch.manual_seed(case.rows)
    xs = [torch.randn(case.rows, case.dim) for _ in range(case.n)]
    states = torch.randn(case.n + 1, case.rows, case.dim)
    drop = 1.25 * (torch.rand(case.rows, case.dim) > 0.2).float() if mask else None
    given = Inputs(layer, draw_probes(states, probes), states, xs, drop)
    return given.to(DTYPES[case.dtype])


def double_backward(given: Inputs) -> Penalty:
    """The definition: squares of VJPs of the naive equations, differentiated by autograd."""
    layer, n = given.layer, len(given.xs)
    xs = [x.clone().requires_grad_() for x in given.xs]
    x, x_fuse = testing.naive_injections(layer, xs)
    cells, (combine, z_fuse) = given.states[:-1], (layer.combine, given.states[-1])
    maps = [
        lambda z, i=i: testing.naive_cell(layer.cells[i], z, x[:, i])  # type: ignore[misc]
        for i in range(n)
    ]
    maps.append(lambda z: testing.naive_combine(combine, z, list(cells), x_fuse, given.mask))
    values = []
    for f, state, probes in zip(maps, [*cells, z_fuse], given.probes.unbind(1), strict=True):
        z = state.clone().requires_grad_()
        fz = f(z)
        pulled = [torch.autograd.grad(fz, z, v, create_graph=True)[0] for v in probes]
        values.append(torch.stack([p.square().sum(-1) for p in pulled]).sum(0))
    value = torch.stack(values)
    leaves = [*xs, *flat(layer)]
    grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)
    return value.detach(), list(grads[:n]), list(grads[n:])


def assert_near(given: Penalty, wanted: Penalty, limit: float) -> None:
    """Each tensor relative to its largest entry, or to 1e-4 of the largest of all gradients."""
    assert len(given[1]) == len(wanted[1])
    assert len(given[2]) == len(wanted[2])
    pairs = list(zip([*given[1], *given[2]], [*wanted[1], *wanted[2]], strict=True))
    scale = 1e-4 * max(float(b.abs().max()) for _, b in pairs)
    for i, (a, b) in enumerate([(given[0], wanted[0]), *pairs]):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), i
        error = (a - b).abs().max() / max(b.abs().max(), scale if i else 0)
        assert error <= limit, (i, float(error))
