"""The layer on the device's own backend: the cuda backend as a whole; the same tests on the CPU.

``torch.compile``, export, ``torch.func`` and operators on both devices: test_compile.py,
test_export.py, test_transforms.py, test_ops.py; NCCL: test_distributed.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from devices import every_device  # noqa: F401 - autouse
from parameters import scatter_injection, scatter_norms
from torch import Tensor
from torch.func import functional_call

from deqfuse import Anderson, DEQFusion, Implicit, Neumann, OneStep
from deqfuse.backends import cpu_native, cuda_native
from deqfuse.backends.maps import VARIANTS

N = 3
TIGHT = {
    "solver": Anderson(tol=1e-12, max_iter=300),
    "adjoint": Implicit(tol=1e-12, max_iter=300),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
# One launch with the weights in shared memory, one launch, steps.
each_width = pytest.mark.parametrize("dim", [12, 200, 300])


@pytest.fixture(autouse=True)
def needs_its_library() -> None:
    if torch.get_default_device().type == "cuda" and (missing := cuda_native.load_error()):
        pytest.fail(missing)
    if cpu_native.module is None:
        pytest.skip("the C++ extension was not built")


def make(dim: int = 12, **options) -> DEQFusion:
    torch.manual_seed(dim)
    layer = DEQFusion(dim, N, num_groups=2, **{"on_failure": "raise", **TIGHT, **options})
    scatter_norms(layer)
    scatter_injection(layer)
    return layer.double()


def draw(dim: int = 12, rows: int = 5) -> list[Tensor]:
    return list(torch.randn(N, rows, dim, dtype=torch.float64))


def gradients(layer: DEQFusion, xs: list[Tensor], g: Tensor) -> list[Tensor]:
    xs = [x.detach().clone().requires_grad_() for x in xs]
    z, zs = layer(xs, return_cells=True)
    return [z, zs, *torch.autograd.grad((z, zs), [*xs, *layer.parameters()], (g[0], g[1:]))]


def test_the_backend_is_the_devices_own():
    _, info = make()(draw(), return_info=True)
    assert info.backend == torch.get_default_device().type


@each_variant
@each_width
@pytest.mark.parametrize("adjoint", [TIGHT["adjoint"], OneStep(), Neumann(3)], ids=repr)
def test_values_and_gradients_are_those_of_the_reference_on_the_cpu(variant, dim, adjoint):
    layer, xs = make(dim, variant=variant, adjoint=adjoint), draw(dim)
    g = torch.randn(N + 1, *xs[0].shape, dtype=torch.float64)
    slow = copy.deepcopy(layer).cpu()
    slow.backend = "reference"
    expected = gradients(slow, [x.cpu() for x in xs], g.cpu())
    floor = 1e-3 * max(t.norm() for t in expected)  # some gradients are zero but for rounding
    for given, wanted in zip(gradients(layer, xs, g), expected, strict=True):
        assert (given.cpu() - wanted).norm() <= 1e-8 * max(wanted.norm(), floor)


@each_variant
def test_gradcheck(variant):
    layer, xs = make(variant=variant), [x.requires_grad_() for x in draw(rows=2)]
    names = [name for name, _ in layer.named_parameters()]

    def call(*tensors: Tensor) -> Tensor:
        state = dict(zip(names, tensors[N:], strict=True))
        return functional_call(layer, state, (list(tensors[:N]),))

    leaves = [*xs, *layer.parameters()]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_an_autocast_region_storage_follows_and_the_solve_keeps_float32(dtype):
    layer = make(in_dims=[5] * N, solver=Anderson(tol=1e-6), adjoint=Implicit(tol=1e-5)).float()
    xs = [x.float().requires_grad_() for x in draw(5)]
    with torch.autocast(torch.get_default_device().type, dtype=dtype):
        z, info = layer(xs, return_info=True)
    assert z.dtype == dtype
    assert info.fuse.residual.dtype == torch.float32
    assert info.converged.all()
    z.float().square().sum().backward()
    exact = layer([x.detach() for x in xs])
    assert (z - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_modes_without_gradients_give_the_same_values():
    layer, xs = make(), draw()
    expected = layer(xs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer(xs), expected)
