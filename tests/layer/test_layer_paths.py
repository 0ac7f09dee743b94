"""What the one operator for the whole layer must not change for those who use the module."""

from __future__ import annotations

import contextlib

import pytest
import torch

from deqfuse import DEQFusion
from deqfuse.backends import cpu_native

BACKENDS = ["reference"] + (["cpu"] if cpu_native.module is not None else [])


def features(dim: int, n: int, rows: int = 5) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(rows, dim) for _ in range(n)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_penalty_uses_the_tensors_of_its_own_call(backend: str) -> None:
    """``functional_call`` puts the module's parameters back before the penalty is asked for."""
    layer = DEQFusion(16, 3, num_groups=2, backend=backend)
    xs, weights = features(16, 3), torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
    _, info = torch.func.functional_call(
        layer, {"modality_weights": weights}, (xs,), {"return_info": True}
    )
    torch.manual_seed(2)
    penalty = info.jacobian_penalty()
    (grad,) = torch.autograd.grad(penalty, weights)

    twin = DEQFusion(16, 3, num_groups=2, backend=backend)
    twin.load_state_dict({**layer.state_dict(), "modality_weights": weights.detach()})
    _, info = twin(xs, return_info=True)
    torch.manual_seed(2)
    expected = info.jacobian_penalty()
    (expected_grad,) = torch.autograd.grad(expected, twin.modality_weights)
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert grad.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_mixed_features_are_promoted_in_any_order(backend: str, order: tuple[int, int]) -> None:
    layer, xs = DEQFusion(16, 2, num_groups=2, backend=backend), features(16, 2)
    xs = [xs[0].bfloat16(), xs[1]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer([xs[i] for i in order]).dtype == torch.float32


@pytest.mark.parametrize("grad", [True, False])
def test_a_parameter_left_on_meta_is_named(grad: bool) -> None:
    """Torch would take the kernel that knows shapes only; its answer is memory as it was."""
    layer, xs = DEQFusion(16, 2), features(16, 2)
    layer.combine.fuse.weight = torch.nn.Parameter(layer.combine.fuse.weight.to("meta"))
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"device cpu.*got meta"):
        layer(xs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_parameter_of_the_wrong_shape_is_named(backend: str, grad: bool) -> None:
    with contextlib.nullcontext() if grad else torch.no_grad():
        for shape in ((16, 8), (256,)):
            layer = DEQFusion(16, 2, num_groups=2, backend=backend)
            layer.cells[0].linear1.weight = torch.nn.Parameter(torch.randn(shape))
            with pytest.raises(ValueError, match=r"params\[0\]: expected shape \(16, 16\)"):
                layer(features(16, 2))
        layer = DEQFusion(16, 2, num_groups=2, backend=backend)
        layer.cells[1].linear2.bias = None
        with pytest.raises(TypeError, match=r"cells\.1\.linear2\.bias: expected a torch\.Tensor"):
            layer(features(16, 2))


@pytest.mark.skipif(cpu_native.module is None, reason="the compiled module is missing")
def test_the_kernels_own_door_is_locked() -> None:
    """What would read or write beyond a tensor is refused, whoever calls."""
    layer, x = DEQFusion(8, 2, num_groups=2), torch.randn(2, 3, 8)
    params = [p.detach() for cell in layer.cells for p in cell.flat()]

    def solve(
        x: torch.Tensor = x, groups: int = 2, max_iter: int = 9, history: int = 5, steps: int = 0
    ) -> None:
        cast = [p.to(x.dtype) for p in params]
        cpu_native.solve_cells(
            x, cast, None, groups, False, 1e-4, max_iter, history, 1.0, 1e-6, steps
        )

    solve()
    for wrong in (
        {"x": x.int()},
        {"groups": 0},
        {"groups": 3},
        {"history": 9},
        {"steps": 8},
        {"max_iter": -1},
    ):
        with pytest.raises(RuntimeError, match="deqfuse"):
            solve(**wrong)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="deqfuse: params"):
        cpu_native.solve_cells(x, params[:-1], None, 2, False, 1e-4, 9, 5, 1.0, 1e-6, 0)
    with pytest.raises(RuntimeError, match="deqfuse: params"):
        cpu_native.solve_layer(
            [x[0], x[1]], params, None, None, None, None, 2, False, False, 1e-4, 9, 5, 1.0, 1e-6, 0
        )
    with pytest.raises(RuntimeError, match="deqfuse: x"):
        cpu_native.solve_layer(
            [], params, None, None, None, None, 2, False, False, 1e-4, 9, 5, 1.0, 1e-6, 0
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_on_the_cells_alone_does_not_see_a_failed_fuse_row(backend: str) -> None:
    layer = DEQFusion(16, 2, num_groups=2, backend=backend, on_failure="ignore")
    xs = [x.requires_grad_() for x in features(16, 2)]
    start = torch.zeros(5, 16)
    start[2] = torch.nan
    _, zs = layer(xs, z0=(start, torch.zeros(2, 5, 16)), return_cells=True)
    weights = torch.randn_like(zs)
    (zs * weights).sum().backward()
    got = [x.grad for x in xs] + [p.grad for p in layer.cells.parameters()]
    assert all(g is not None and g.isfinite().all() for g in got)
    assert layer.modality_weights.grad is None

    for x in xs:
        x.grad = None
    layer.zero_grad()
    _, zs = layer(xs, return_cells=True)
    (zs * weights).sum().backward()
    again = [x.grad for x in xs] + [p.grad for p in layer.cells.parameters()]
    for before, after in zip(got, again, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(cpu_native.module is None, reason="the compiled module is missing")
def test_a_huge_budget_is_a_budget() -> None:
    from deqfuse import Anderson

    layer = DEQFusion(8, 2, num_groups=2, solver=Anderson(max_iter=2**40), backend="cpu")
    _, info = layer(features(8, 2), return_info=True)
    assert info.nfe.min() > 1
