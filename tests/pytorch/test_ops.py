"""The four operators as PyTorch sees them: schemas, fake kernels, opcheck, torch.compile."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from devices import every_device, own_backend  # noqa: F401 - autouse
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from deqfuse import Anderson, DEQFusion, Implicit, NewtonKrylov, OneStep, Picard
from deqfuse.backends import cpu_native
from deqfuse.backends.maps import VARIANTS

ops = torch.ops.deqfuse

DIM, N, GROUPS = 12, 2, 2
SOLVER = Anderson(tol=1e-10, max_iter=200)
ADJOINT = Implicit(tol=1e-10, max_iter=200)
OPERATORS = ("solve_cells", "solve_fuse", "adjoint_cells", "adjoint_fuse")
BACKENDS = ["reference"] + (["compiled"] if cpu_native.module is not None else [])
each_backend = pytest.mark.parametrize("backend", BACKENDS)
ALL_CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def arguments(
    operator: str,
    rows: int = 3,
    *,
    dtype: torch.dtype = torch.float64,
    variant: str = "paper",
    solver=SOLVER,
    optional: bool = True,  # whether mask and z0 are given, and parameter gradients wanted
    requires_grad: bool = True,
    backend: str = "reference",
) -> tuple:
    """A valid call; the adjoint operators take the equilibrium that the solve finds."""
    torch.manual_seed(0)
    layer = DEQFusion(DIM, N, num_groups=GROUPS, variant=variant).to(dtype)
    cells = [t.detach() for cell in layer.cells for t in cell.flat()]
    fuse = [t.detach() for t in layer.combine.flat()]
    x = torch.randn(N, rows, DIM).to(dtype)
    mask = (torch.randn(rows, DIM) > 0).to(dtype) * 2 if optional else None
    own = own_backend(backend)
    code = (GROUPS, variant, solver.code, ADJOINT.code, own, "ignore")
    kind = operator.removeprefix("solve_").removeprefix("adjoint_")
    if kind == "cells":
        tensors, rest = (x, cells), (0.1 * torch.randn_like(x) if optional else None, *code)
    else:
        start = 0.1 * torch.randn_like(x[0]) if optional else None
        tensors, rest = (x.sum(0), x.mean(0), fuse), (mask, start, N, *code)
    if requires_grad:
        for t in itertools.chain(tensors[:-1], tensors[-1]):
            t.requires_grad_()
    if operator.startswith("solve"):
        return *tensors, *rest
    solve = getattr(ops, f"solve_{kind}")
    with torch.no_grad():
        z = solve(*tensors, *rest)[0]
    tail = (GROUPS, variant, ADJOINT.code, own, optional)
    middle = () if kind == "cells" else (mask, N)
    return torch.randn_like(z), z, *tensors, *middle, *tail


# ---- opcheck -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("optional", [True, False], ids=["full", "minimal"])
@pytest.mark.parametrize("operator", ["solve_cells", "solve_fuse"])
def test_opcheck_of_the_solves(operator, optional, variant):
    call = arguments(operator, optional=optional, variant=variant)
    result = torch.library.opcheck(getattr(ops, operator), call, test_utils=ALL_CHECKS)
    assert set(result.values()) == {"SUCCESS"}


@each_backend
@pytest.mark.parametrize("operator", ["solve_cells", "solve_fuse"])
def test_opcheck_of_the_solves_of_each_backend(operator, backend):
    call = arguments(operator, backend=backend)
    result = torch.library.opcheck(getattr(ops, operator), call, test_utils=ALL_CHECKS)
    assert set(result.values()) == {"SUCCESS"}


@each_backend
@pytest.mark.parametrize("optional", [True, False], ids=["full", "minimal"])
@pytest.mark.parametrize("operator", ["adjoint_cells", "adjoint_fuse"])
def test_opcheck_of_the_adjoints(operator, optional, backend):
    """Without gradients: these operators refuse to be differentiated, which opcheck would try."""
    call = arguments(operator, optional=optional, requires_grad=False, backend=backend)
    result = torch.library.opcheck(getattr(ops, operator), call, test_utils=ALL_CHECKS)
    assert set(result.values()) == {"SUCCESS"}


@each_backend
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck_of_an_empty_batch(operator, backend):
    call = arguments(operator, 0, requires_grad=False, backend=backend)
    result = torch.library.opcheck(getattr(ops, operator), call, test_utils=ALL_CHECKS)
    assert set(result.values()) == {"SUCCESS"}


# ---- fake kernels --------------------------------------------------------------------------------


def described(value) -> list[tuple]:
    """Shape, stride, dtype and device of every tensor in an operator's output."""
    tensors = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in value)
    return [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors]


def to_fake(mode: FakeTensorMode, value):
    if isinstance(value, list):
        return [mode.from_tensor(t) for t in value]
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 1, 0])
@pytest.mark.parametrize("optional", [True, False], ids=["full", "minimal"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_outputs_look_like_real_ones(operator, optional, rows, dtype):
    call = arguments(operator, rows, dtype=dtype, optional=optional, requires_grad=False)
    if dtype != torch.float64:  # a tolerance that float32 can reach
        loose = {SOLVER.code: Anderson().code, ADJOINT.code: Implicit().code}
        call = tuple(loose.get(a, a) if isinstance(a, str) else a for a in call)
    real = getattr(ops, operator)(*call)
    with FakeTensorMode() as mode:
        fake = getattr(ops, operator)(*(to_fake(mode, a) for a in call))
    assert described(fake) == described(real)


@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_strides_of_non_contiguous_arguments(operator):
    def transposed(value):
        return value.mT.contiguous().mT if isinstance(value, Tensor) else value

    call = tuple(transposed(a) for a in arguments(operator, requires_grad=False))
    real = getattr(ops, operator)(*call)
    with FakeTensorMode() as mode:
        fake = getattr(ops, operator)(*(to_fake(mode, a) for a in call))
    assert described(fake) == described(real)


@pytest.mark.parametrize(
    "solver",
    [Anderson(max_iter=30), Anderson(max_iter=30, rescue=True), Picard(), NewtonKrylov(tol=1e-6)],
    ids=repr,
)
@pytest.mark.parametrize("operator", ["solve_cells", "solve_fuse"])
def test_fake_trace_has_the_real_length(operator, solver):
    solver = dataclasses.replace(solver, trace=True)
    call = arguments(operator, solver=solver, requires_grad=False)
    real = getattr(ops, operator)(*call)
    with FakeTensorMode() as mode:
        fake = getattr(ops, operator)(*(to_fake(mode, a) for a in call))
    assert described(fake) == described(real)
    assert real[-1].shape[0] == solver.max_iter


@pytest.mark.parametrize("operator", OPERATORS)
def test_outputs_do_not_alias_inputs_or_each_other(operator):
    call = arguments(operator, requires_grad=False)
    flat = [t for a in call for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
    before = [t.clone() for t in flat]
    out = getattr(ops, operator)(*call)
    results = [t for v in out for t in (v if isinstance(v, list) else [v])]
    storages = [t.untyped_storage().data_ptr() for t in (*flat, *results) if t.numel()]
    assert len(storages) == len(set(storages))
    assert all(torch.equal(a, b) for a, b in zip(before, flat, strict=True))


# ---- torch.compile -------------------------------------------------------------------------------


def run(call, layer: DEQFusion, xs: list[Tensor], g: Tensor) -> list[Tensor]:
    xs = [x.clone().requires_grad_() for x in xs]
    for x in xs:
        torch._dynamo.mark_dynamic(x, 0)
    z, zs = call(xs)
    leaves = [*xs, *layer.parameters()]
    return [z, zs, *torch.autograd.grad((z, zs), leaves, (g[0], g[1:]))]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "released"},
        {"variant": "released-mmimdb", "in_dims": [DIM] * N, "injection_norm": True},
        {"gate": False},
        {"cell": "identity"},
        {"adjoint": OneStep()},
        {"on_failure": "warn"},
    ],
    ids=str,
)
def test_compiled_layer_is_the_eager_one_with_one_graph_for_all_batch_sizes(options):
    torch.manual_seed(0)
    options = {"solver": SOLVER, "adjoint": ADJOINT, **options}
    layer = DEQFusion(DIM, N, num_groups=GROUPS, **options).double()
    with torch.no_grad():
        for cell in layer.cells:
            cell.norm3.weight.mul_(0.3)
    counter = CompileCounterWithBackend("aot_eager")

    def call(xs: list[Tensor]):
        return layer(xs, return_cells=True)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    inputs = [torch.randn(2 * N + 1, rows, DIM, dtype=torch.float64) for rows in (4, 7, 32)]
    for each in inputs:
        xs, g = list(each[:N]), each[N:]
        for a, b in zip(run(compiled, layer, xs, g), run(call, layer, xs, g), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert counter.frame_count == 1


def test_compiled_layer_tells_its_statistics():
    torch.manual_seed(0)
    layer = DEQFusion(DIM, N, num_groups=GROUPS)
    xs = [torch.randn(5, DIM) for _ in range(N)]
    compiled = torch.compile(
        lambda xs: layer(xs, return_info=True), fullgraph=True, backend="aot_eager"
    )
    z, info = compiled(xs)
    expected, eager = layer(xs, return_info=True)
    torch.testing.assert_close(z, expected)
    assert torch.equal(info.fuse.nfe, eager.fuse.nfe)
    assert torch.equal(info.cells.outcome, eager.cells.outcome)
    assert info.converged.all()


def test_compiled_layer_with_the_same_tensor_twice():
    torch.manual_seed(0)
    layer = DEQFusion(DIM, N, num_groups=GROUPS, solver=SOLVER, adjoint=ADJOINT).double()
    x, g = torch.randn(2, 5, DIM, dtype=torch.float64)
    x.requires_grad_()
    compiled = torch.compile(lambda x: layer([x, x]), fullgraph=True, backend="aot_eager")
    (given,) = torch.autograd.grad(compiled(x), x, g)
    (expected,) = torch.autograd.grad(layer([x, x]), x, g)
    torch.testing.assert_close(given, expected, rtol=1e-8, atol=1e-8)
