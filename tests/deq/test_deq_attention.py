"""``DEQ`` of attention: the remedies of a warning need derivatives that fused kernels lack."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from deq_cases import EXACT, assert_gradients
from torch import Tensor, nn

from deqfuse import DEQ, Anderson, NewtonKrylov, ProFusion
from deqfuse.solvers.derivatives import jvp_of
from deqfuse.solvers.options import SolverOption

B, T, D = 3, 5, 8
Step = Callable[[Tensor, Tensor], Tensor]


def scaled_dot_product() -> Step:
    def f(z: Tensor, x: Tensor) -> Tensor:
        h = z.view(B, T, 2, D // 2).transpose(1, 2)  # four dimensions: the flash kernel's form
        out = nn.functional.scaled_dot_product_attention(h, h, h)
        return 0.5 * torch.tanh(out.transpose(1, 2).reshape(B, T, D) + x)

    return f


def module_step(module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> Step:
    module = module.double().eval()  # in eval mode, without gradients, torch has a fast path
    return lambda z, x: 0.2 * torch.tanh(call(module, z) + x)


def multihead(frozen: bool = False) -> Step:
    module = nn.MultiheadAttention(D, 2, batch_first=True).requires_grad_(not frozen)
    return module_step(module, lambda m, z: m(z, z, z, need_weights=False)[0])


def transformer() -> Step:
    module = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True, dropout=0.0)
    # Off zero, where its LayerNorm would stretch any difference.
    return module_step(module, lambda m, z: m(z + torch.linspace(-3, 3, D, dtype=z.dtype)))


MAPS: dict[str, Callable[[], Step]] = {
    "scaled_dot_product_attention": scaled_dot_product,
    "MultiheadAttention": multihead,
    "MultiheadAttention, frozen": lambda: multihead(frozen=True),
    "TransformerEncoderLayer": transformer,
}
attention = pytest.mark.parametrize("name", MAPS)


def problem(name: str) -> tuple[Step, Tensor, Tensor]:
    torch.manual_seed(0)
    f = MAPS[name]()
    x = torch.randn(B, T, D, dtype=torch.float64)
    return f, x, torch.zeros_like(x)


@attention
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "solver", [NewtonKrylov(tol=1e-10), Anderson(tol=1e-10, max_iter=4, rescue=True)], ids=repr
)
def test_newton_and_the_rescue_solve_it(name: str, solver: SolverOption, grad: bool) -> None:
    f, x, start = problem(name)
    with torch.set_grad_enabled(grad):
        z, info = DEQ(f, solver=solver)(start, x)
    assert info.converged.all()
    torch.testing.assert_close(z, f(z, x), rtol=1e-8, atol=1e-8)


@attention
def test_the_jacobian_penalty_is_that_of_the_plain_formula(name: str) -> None:
    f, x, start = problem(name)
    x.requires_grad_()
    z, info = DEQ(f, on_failure="ignore", adjoint=EXACT)(start, x)
    torch.manual_seed(1)
    penalty = info.jacobian_penalty(num_probes=2)
    (found,) = torch.autograd.grad(penalty, x)

    star = z.detach().requires_grad_()
    torch.manual_seed(1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        total = torch.zeros((), dtype=x.dtype)
        for _ in range(2):
            probe = torch.randn(B, T * D, dtype=x.dtype).view_as(x)
            (vjp,) = torch.autograd.grad(f(star, x), star, probe, create_graph=True)
            total = total + vjp.square().sum() / (2 * x.numel())
    assert_gradients([penalty.detach()], [total.detach()], tol=1e-10)
    assert_gradients([found], [torch.autograd.grad(total, x)[0]], tol=1e-10)


def test_torchs_switches_are_as_they_were() -> None:
    f, x, start = problem("MultiheadAttention")

    def switches() -> list[bool]:
        mha, cuda, onednn = torch.backends.mha, torch.backends.cuda, torch.backends.mkldnn
        return [mha.get_fastpath_enabled(), cuda.flash_sdp_enabled(), onednn.enabled]

    before = switches()
    with pytest.raises(ZeroDivisionError):
        jvp_of(lambda z: z / (1 // 0))(x)(x)
    DEQ(f, solver=NewtonKrylov())(start, x)
    assert switches() == before


def test_progressive_fusion_around_attention() -> None:
    class Join(nn.Module):
        def forward(self, xs: list[Tensor]) -> Tensor:
            return torch.tanh(sum(x.mean(1) for x in xs))

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True, dropout=0.0)
    model = ProFusion([layer], Join(), D, solver=NewtonKrylov(), in_dims=[D])
    _, info = model([torch.randn(B, T, D)], return_info=True)
    assert info.converged.all()
    info.jacobian_penalty().backward()
    assert model.back_projections[0].weight.grad is not None


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_have_these_derivatives_too(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    layer = kind(D, D, batch_first=True)
    f = lambda z, x: 0.5 * torch.tanh(layer(z)[0]) + x  # noqa: E731
    for solver in (NewtonKrylov(), Anderson(max_iter=2, rescue=True)):
        _, info = DEQ(f, solver=solver)(torch.zeros(B, T, D), torch.randn(B, T, D))
        assert info.converged.all()
        assert info.jacobian_penalty() > 0


def test_jvp_of_a_map_without_a_jacobian_is_zero() -> None:
    z = torch.randn(2, 3)
    assert not jvp_of(lambda z: torch.ones_like(z))(z)(z).any()
    assert not jvp_of(lambda z: z.detach())(z)(z).any()
