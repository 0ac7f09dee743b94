"""What ``torch.compile(mode="reduce-overhead")`` may hold in a CUDA graph; without a GPU."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deqfuse import Anderson, DEQFusion, Implicit, Neumann
from deqfuse.backends import BACKENDS, cuda, cuda_native
from deqfuse.operators import captures, registered, solve
from deqfuse.operators.blocks import BLOCKS, CELLS, LAYER


class Operators(TorchDispatchMode):
    """Names of the library's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "deqfuse":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 that only fake tensors can lie on."""
    rehearsed = dataclasses.replace(
        cuda.BACKEND, unavailable=lambda: None, refuses=cuda.refuses_problem
    )
    monkeypatch.setitem(BACKENDS, "cuda", rehearsed)
    monkeypatch.setattr(cuda, "_shared_bytes", lambda device: 227 << 10)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_only_the_twins_are_tagged(block) -> None:
    for operators in (block.solve, block.adjoint):
        assert torch.Tag.cudagraph_unsafe not in operators.captured.tags
        assert torch.Tag.cudagraph_unsafe in operators.uncaptured.tags


def called(dim: int, backend: str, solver=None, adjoint=None, masked=False) -> list[str]:
    """Operators of a solve of cells and of its adjoint, without values."""
    solver, adjoint = (option.code for option in (solver or Anderson(), adjoint or Implicit()))
    with FakeTensorMode(), Operators() as operators:
        x = torch.empty(2, 5, dim, device="cuda")
        present = torch.empty(2, 5, 1, device="cuda", dtype=torch.bool) if masked else None
        square, vector = (torch.empty(*shape, device="cuda") for shape in ((dim, dim), (dim,)))
        params = 2 * [square, vector, square, vector, *[vector] * 6]
        options = (4, "paper", solver, adjoint, backend, "ignore")
        z, *_ = solve(CELLS, [x], params, (None, present), options)
        registered._call_adjoint(
            CELLS, z, z, x, params, present, 4, "paper", adjoint, backend, True
        )
    return operators.names


@pytest.mark.parametrize(
    ("dim", "options", "library", "forward", "backward"),
    [
        (64, {}, True, True, True),
        (64, {}, False, True, False),  # Krylov solvers ask the device when to stop
        (64, {"adjoint": Neumann(3)}, True, True, True),
        (64, {"adjoint": Implicit("gmres")}, True, True, False),
        (64, {"solver": Anderson(rescue=True)}, True, False, True),
        (64, {"solver": Anderson(trace=True)}, True, False, True),  # steps
        (64, {"masked": True}, True, False, False),  # rows are gathered by what is present
        (300, {}, True, False, True),  # steps, which keep memory for the next solve
    ],
    ids=repr,
)
def test_whole_solves_and_the_librarys_adjoints_can_be_captured(
    dim, options, library, forward, backward, monkeypatch
) -> None:
    monkeypatch.setattr(cuda_native, "device_error", lambda index: None if library else "none")
    names = ("solve_cells", forward), ("adjoint_cells", backward)
    expected = [name if captured else f"{name}_uncaptured" for name, captured in names]
    assert called(dim, "cuda", **options) == expected


@pytest.mark.parametrize("rescue", [False, True])
@pytest.mark.parametrize("alone", [False, True], ids=["one call", "gathering"])
def test_a_layer_whose_rows_lack_modalities_can_be_captured(rescue, alone, monkeypatch) -> None:
    """Where the backend takes the mask; not where rows are gathered, or looked at for a rescue."""
    monkeypatch.setattr(cuda_native, "device_error", lambda index: None)
    if alone:
        plain = dataclasses.replace(BACKENDS["cuda"], solve_present=None, adjoint_present=None)
        monkeypatch.setitem(BACKENDS, "cuda", plain)
    codes = Anderson(rescue=rescue).code, Implicit().code
    with FakeTensorMode(), Operators() as operators:
        x = [torch.empty(5, 64, device="cuda") for _ in range(2)]
        present = torch.empty(2, 5, 1, device="cuda", dtype=torch.bool)
        square, vector = (torch.empty(*shape, device="cuda") for shape in ((64, 64), (64,)))
        params = 2 * [square, vector, square, vector, *[vector] * 6]
        params += [square, vector, square, vector, vector, vector, torch.empty(2, device="cuda")]
        options = (4, "paper", *codes, "cuda", "ignore")
        z, states, *_ = solve(LAYER, x, params, (None, None, None, present), options)
        registered._call_adjoint(
            LAYER, z, None, states, x, params, None, present, 4, "paper", codes[1], "cuda", True
        )
    captured = not alone and not rescue, not alone
    names = zip(("solve_layer", "adjoint_layer"), captured, strict=True)
    assert operators.names == [name if held else f"{name}_uncaptured" for name, held in names]


def test_what_asks_the_device_how_far_it_is_cannot() -> None:
    assert called(64, "reference") == ["solve_cells_uncaptured", "adjoint_cells_uncaptured"]


@pytest.mark.parametrize("uncaptured", [False, True])
def test_a_compiled_step_takes_the_same_way(uncaptured, monkeypatch) -> None:
    """Dynamo does not trace into the question, and the twin computes the same."""
    if uncaptured:
        monkeypatch.setattr(captures, "DEVICE", "cpu")
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = DEQFusion(16, 2, on_failure="ignore", backend="reference")
    xs = [torch.randn(3, 16, requires_grad=True) for _ in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for model in (layer, compiled):
        layer.zero_grad()
        model(xs).square().mean().backward()
        found = [p.grad.clone() for p in layer.parameters()]
        if model is layer:
            expected = found
    for mine, wanted in zip(found, expected, strict=True):
        assert torch.equal(mine, wanted)
    (graph,) = counter.graphs
    names = set(re.findall(r"deqfuse\.(\w+)", graph.code))
    assert names == {"solve_layer_uncaptured" if uncaptured else "solve_layer"}
