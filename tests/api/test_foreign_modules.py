"""What other tools make of modules: torch.jit, torch.fx, Opacus, adapters, copies."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from deqfuse import DEQ, Anderson, DEQFusion, ProFusion

B, D = 4, 8
HOW: list[dict[str, Any]] = [{"steps": 2}, {"solver": Anderson()}]
JIT = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


class Join(nn.Module):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.tanh(0.3 * sum(xs))


class OfLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fusion = DEQFusion(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fusion([x, 2 * x])


class OfDEQ(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.deq = DEQ(self.step)

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.3 * torch.tanh(self.linear(z)) + x

    def forward(self, x: Tensor) -> Tensor:
        return self.deq(torch.zeros_like(x), x)[0]


class OfProFusion(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.model = ProFusion([nn.Linear(D, D)], Join(), D, **(how or {"steps": 2}))

    def forward(self, x: Tensor) -> Tensor:
        return self.model([x])


# ---- torch.jit -----------------------------------------------------------------------------------


@JIT
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(B, D))]
)
@pytest.mark.parametrize("how", HOW, ids=repr)
def test_encoders_of_torch_jit_are_refused(make: Callable[[Any], Any], how: Any) -> None:
    scripted = make(nn.Sequential(nn.Linear(D, D), nn.Tanh()))
    with pytest.raises(TypeError, match=r"encoders\[0\]: expected modules that take hooks.*Remedy"):
        ProFusion([scripted], Join(), D, in_dims=[D], **how)
    inside = nn.Sequential(nn.Linear(D, D), scripted)
    with pytest.raises(TypeError, match=r"encoders\[0\].*the encoder's own input as the site"):
        ProFusion([inside], Join(), D, sites=["1"], in_dims=[D], **how)
    assert ProFusion([inside], Join(), D, **how)([torch.randn(B, D)]).shape == (B, D)


@JIT
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "kind", [OfLayer, OfDEQ, functools.partial(OfProFusion, solver=Anderson())], ids=str
)
def test_jit_trace_is_refused(kind: Callable[[], nn.Module], grad: bool) -> None:
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(NotImplementedError, match=r"torch.jit.trace.*Remedy: torch.export.export"),
    ):
        torch.jit.trace(kind(), torch.randn(B, D))


# ---- torch.fx ------------------------------------------------------------------------------------


class Leaves(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        own = isinstance(module, (DEQFusion, DEQ, ProFusion))
        return own or super().is_leaf_module(module, name)


@pytest.mark.parametrize("kind", [OfLayer, OfDEQ, OfProFusion])
def test_fx_takes_the_modules_as_leaves(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = kind(), torch.randn(B, D)
    with pytest.raises(TypeError, match=r"got a Proxy of torch.fx. Remedy: a Tracer"):
        fx.symbolic_trace(module)
    traced = fx.GraphModule(module, Leaves().trace(module))
    torch.testing.assert_close(traced(x), module(x), rtol=0, atol=0)


# ---- parts of the layer --------------------------------------------------------------------------


def test_hooks_of_opacus_on_parts_are_refused() -> None:
    def capture(module: nn.Module, args: Any, output: Any) -> None:
        raise AssertionError("never fires")

    for part in ("cells.0.linear1", "cells.1.norm3", "combine.gate"):
        module, xs = DEQFusion(D, 2), [torch.randn(B, D)] * 2
        module.get_submodule(part).register_forward_hook(capture)
        module(xs)  # hooks of others do not fire, which is documented
        capture.__module__ = "opacus.grad_sample.grad_sample_module"
        with pytest.raises(TypeError, match=rf"{part}: expected no hooks of Opacus.*vmap"):
            module(xs)
        capture.__module__ = __name__


def test_an_adapter_is_named_in_full() -> None:
    class Linear(nn.Module):
        """Low-rank adaptation: what adapters put in the place of a Linear has its name."""

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

    module = DEQFusion(D, 2)
    module.combine.fuse = Linear(module.combine.fuse)
    with pytest.raises(TypeError, match=rf"expected torch.nn.Linear.*got {__name__}\..*\.Linear\."):
        module([torch.randn(B, D)] * 2)


# ---- encoders that pass no gradient --------------------------------------------------------------


class Frozen(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(D, D), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.linear(x)
        return self.linear(x).detach() if self.how == "detach" else self.linear(x)


@pytest.mark.parametrize("how", HOW, ids=repr)
@pytest.mark.parametrize("kind", ["no_grad", "detach"])
def test_an_encoder_that_passes_no_gradient_is_refused(kind: str, how: Any) -> None:
    model, x = ProFusion([Frozen(kind)], Join(), D, **how), torch.randn(B, D)
    with pytest.raises(ValueError, match=r"encoders\[0\].*back_projections\[0\] can be trained"):
        model([x])
    with torch.no_grad():
        assert model([x]).shape == (B, D)
    given = ProFusion([Frozen(kind)], Join(), D, steps=1)
    assert given([x]).shape == (B, D)
    frozen = ProFusion([Frozen("not at all").requires_grad_(False)], Join(), D, **how)
    frozen.back_projections.requires_grad_()
    frozen([x]).sum().backward()
    assert frozen.back_projections[0].weight.grad.abs().sum() > 0


# ---- copies --------------------------------------------------------------------------------------


class Owner(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        ways = {
            "lambda": lambda z, x: self.step(z, x),
            "bound method": self.step,
            "module": self.linear,
        }
        self.deq = DEQ(ways[how]) if how != "module" else DEQ(nn.Tanh())
        if how == "module":
            self.deq.f = nn.Sequential(self.linear, nn.Tanh())

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.linear(z)) + x


@pytest.mark.parametrize(("how", "follows"), [("lambda", False), ("bound method", True),
                                             ("module", True)])  # fmt: skip
def test_what_a_copy_of_the_owner_solves(how: str, follows: bool) -> None:
    """A lambda keeps the module that it closes over; README and docstring say so."""
    owner, x = Owner(how), torch.randn(B, D)
    args = () if how == "module" else (x,)
    copied = copy.deepcopy(owner)
    averaged = torch.optim.swa_utils.AveragedModel(owner).module
    with torch.no_grad():
        before = owner.deq(torch.zeros(B, D), *args)[0]
        for clone in (copied, averaged):
            clone.linear.weight.zero_()
            clone.linear.bias.fill_(1.0)
            changed = not torch.equal(clone.deq(torch.zeros(B, D), *args)[0], before)
            assert changed == follows
