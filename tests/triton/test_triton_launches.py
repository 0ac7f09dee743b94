"""What the cuda backend launches, and what it chooses; under Triton's interpreter."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import SolveCase as Case
from triton_cases import poison  # noqa: F401 - a fixture

from deqfuse import Anderson, Broyden, DEQFusion, Implicit, Neumann, Picard, Unrolled, reporting
from deqfuse.backends import BACKENDS, Problem, cuda
from deqfuse.backends.maps import VARIANTS
from deqfuse.triton_kernels import tiles
from deqfuse.triton_kernels.launch import Launch, counted, intercept

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poison")]


class Operations(TorchDispatchMode):
    """Names of PyTorch's operations that would launch something on a device."""

    FREE = (
        "empty", "empty_like", "new_empty", "empty_strided", "view", "_unsafe_view", "alias",
        "expand", "select", "detach", "slice", "t", "transpose", "unsqueeze", "split", "unbind",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_forward_is_two_launches_and_two_for_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    solve = Case(rows=5, dtype="f32", n=3, variant="released").whole_layer(cuda)
    launches: list[Launch] = []  # not run: the interpreter itself is made of operations
    with intercept(launches.append), Operations() as operations:
        solve(Anderson())
    assert [call.name for call in launches] == ["_solve_cells_kernel", "_solve_fuse_kernel"]
    assert operations.names == ["stack", "cat"], "packing the features and the cells' parameters"


@pytest.mark.parametrize("unit_size", [False, True])
def test_nothing_in_the_module_adds_to_them(
    unit_size: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of ``DEQFusion.forward``, on the backend that tensors on a GPU would take.

    But for a launch for each modality where injections are brought to unit size.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    answers = {"unavailable": lambda: None, "refuses": cuda.refuses_problem}
    monkeypatch.setitem(BACKENDS, "cuda", dataclasses.replace(cuda.BACKEND, **answers))
    layer = DEQFusion(
        12, 3, num_groups=2, injection_norm=unit_size, on_failure="ignore", backend="cuda"
    )
    xs = list(torch.randn(3, 5, 12))
    first = ["_unit_size_kernel"] * 3 if unit_size else []
    for params_need_gradients in (False, True):
        layer.requires_grad_(params_need_gradients)
        launches: list[Launch] = []
        with intercept(launches.append), Operations() as operations:
            layer(xs)
        names = [call.name for call in launches]
        assert names == [*first, "_solve_cells_kernel", "_solve_fuse_kernel"]
        assert operations.names == ["stack", "cat"]


@pytest.mark.parametrize("backward", [False, True])
def test_a_warning_costs_two_copies_and_an_event(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Event:
        def record(self, stream: object) -> None:
            events.append("record")

        def query(self) -> bool:
            return False

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    late: collections.deque = collections.deque()
    monkeypatch.setattr(reporting, "_late", late)
    with FakeTensorMode():
        outcome = torch.zeros(4, 5, dtype=torch.int8, device="cuda")
        residual = torch.zeros(4, 5, device="cuda")
        with Operations() as operations:
            parts = reporting.backward(reporting.LAYER) if backward else reporting.LAYER
            reporting.report(parts, outcome, residual, Anderson(), "warn")
    launched = [name for name in operations.names if name != "device"]  # a fake tensor's own
    assert launched == ["_to_copy", "_to_copy"]
    assert events == ["record"]
    assert [item.statistics.outcome.shape for item in late] == [(5,), (3, 5)][
        :: 1 if backward else -1
    ]
    assert all(item.statistics.residual.device.type == "cpu" for item in late)


def test_launches_of_a_stepped_solve() -> None:
    case, steps = Case(rows=2, dim=160, groups=10, dtype="f32"), 4
    cells, fuse = case.solves(cuda)
    solver = Anderson(max_iter=steps)
    with counted() as names:
        cells(solver)
    assert names == [*["_residual_cell_kernel"] * 2, "_anderson_step_kernel"] * steps
    with counted() as names:
        fuse(solver)
    each = [*["_purify_combine_kernel"] * 2, "_anderson_step_kernel"]
    assert names == ["_gate_constant_kernel", *each * steps]


def test_a_penalty_is_a_launch_a_probe_and_four_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else there is, does not depend on the probes; nothing of it waits for the device."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    case, kinds = Case(rows=5, dtype="f32", n=3, variant="released", mask=True), set()
    layer = case.layer()
    params = [t for part in (*layer.cells, layer.combine) for t in part.flat()]
    params += [layer.modality_weights, layer.injection_bias]
    x, states, mask = list(case.draw(3)), case.draw(4), case.drop()
    for probes in (1, 3):
        given = (case.draw(probes, 4), states, x, params, mask, case.groups)
        launches: list[Launch] = []
        with intercept(launches.append), Operations() as operations:
            cuda.BACKEND.penalty(*given, VARIANTS[case.variant], True)
        names = [call.name for call in launches]
        assert names == [
            *["_residual_cell_penalty_kernel"] * probes,
            *["_purify_combine_penalty_kernel"] * probes,
        ]
        count = collections.Counter(operations.names)
        assert [count.pop(name) for name in ("baddbmm_", "addmm_")] == [2 * probes + 2] * 2
        kinds.add(tuple(sorted(count.items())))
    (others,) = kinds
    expected = {"add", "cat", "clone", "mul", "new_zeros", "stack", "sum"}
    assert {name for name, _ in others} == expected


# ---- choices -------------------------------------------------------------------------------------


def problem(**changes) -> Problem:
    fields = {
        "device": torch.device("cuda"),
        "dtype": torch.float32,
        "dim": 64,
        "num_groups": 4,
        "solver": Anderson(),
        "adjoint": Implicit(),
    }
    return Problem(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"solver": Broyden()}, "not Broyden"),
        ({"solver": Anderson(m=9)}, r"at most 8 residuals, not Anderson\(m=9\)"),
        ({"adjoint": Unrolled()}, "as Unrolled asks"),
        ({"dim": 4096, "num_groups": 2}, "at most 1024 channels, not 2048"),
        # 46341 squared exceeds 31 bits, and 32768 is what the CUDA adjoint takes.
        ({"dim": 33000, "num_groups": 100}, "at most 32768 features, not 33000"),
        (
            {"dim": 300, "solver": Anderson(max_iter=10**6)},
            r"every step here, 4096 at most, and not those of Anderson\(max_iter=1000000\)",
        ),
        (
            {"dim": 300, "adjoint": Neumann(5000)},
            r"4096 at most, and not those of Neumann\(k=5000\)",
        ),
        ({"dtype": torch.float64, "adjoint": Implicit(max_iter=5000)}, "4096 at most"),
    ],
    ids=repr,
)
def test_what_it_cannot_do_is_refused_by_name(changes, reason, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_shared_bytes", lambda device: 227 << 10)
    assert cuda.refuses_problem(problem()) is None
    whole = problem(solver=Anderson(max_iter=10**6), adjoint=Neumann(5000))
    assert cuda.refuses_problem(whole) is None, "one launch, however many steps there are"
    assert re.search(reason, cuda.refuses_problem(problem(**changes)))


def products(run) -> set[str]:
    """Arithmetic of the products in all launches of ``run``."""
    launches: list[Launch] = []
    with intercept(launches.append):
        run()
    return {call.options["PREC"] for call in launches if "PREC" in call.options}


@pytest.mark.parametrize("newer", [False, True], ids=["allow_tf32", "fp32_precision"])
@pytest.mark.parametrize("dim", [64, 160])
def test_tf32_where_the_switch_allows_it_and_the_tolerance_can_be_reached(dim, newer) -> None:
    matmul = torch.backends.cuda.matmul
    for solve in Case(rows=2, dim=dim, dtype="f32").solves(cuda):
        assert products(lambda solve=solve: solve(Anderson())) == {"ieee"}
        before = matmul.fp32_precision
        try:
            if newer:
                matmul.fp32_precision = "tf32"
            else:
                matmul.allow_tf32 = True
            assert products(lambda solve=solve: solve(Anderson(tol=1e-4))) == {"tf32"}
            assert products(lambda solve=solve: solve(Anderson(tol=1e-5))) == {"ieee"}
        finally:
            matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_16_bits_in_storage_do_not_bound_the_tolerance(dtype) -> None:
    """Products are of float32 numbers, in IEEE arithmetic below what TF32 reaches."""
    matmul, solver = torch.backends.cuda.matmul, Anderson(tol=1e-6)
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        for solve in Case(rows=3, dtype=dtype).solves(cuda):
            assert products(lambda solve=solve: solve(solver)) == {"ieee"}
            solved = solve(solver)
            assert solved.z.dtype == torch.float32
            assert (solved.residual <= solver.tol).all()
    finally:
        matmul.fp32_precision = before


def test_a_solve_takes_steps_where_two_weights_do_not_fit(monkeypatch) -> None:
    """99 KB of shared memory a block, as on sm_86, sm_89 and sm_120."""

    class Properties:
        shared_memory_per_multiprocessor = 100 << 10

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cuda._shared_bytes.cache_clear()
    try:
        with FakeTensorMode():
            fits = [
                cuda.one_launch(torch.empty(3, dim, device="cuda"), 4, Anderson())
                for dim in (64, 128)
            ]
    finally:
        cuda._shared_bytes.cache_clear()
    assert fits == [True, False]


@pytest.mark.parametrize(
    ("dim", "groups", "dtype", "solver", "whole"),
    [
        (128, 4, torch.float32, Anderson(), True),
        (128, 4, torch.bfloat16, Picard(), True),
        (50, 2, torch.float32, Anderson(m=1), True),
        (100, 20, torch.float32, Anderson(), False),  # 20 groups of 5 take 32 times 8 columns
        (256, 4, torch.float32, Anderson(), False),
        (64, 4, torch.float64, Anderson(), False),
        (64, 4, torch.float32, Anderson(m=6), False),
        (64, 4, torch.float32, Anderson(trace=True), False),
    ],
)
def test_which_kernel_runs_which_problem(dim, groups, dtype, solver, whole) -> None:
    assert cuda.one_launch(torch.empty(0, dim, dtype=dtype), groups, solver) is whole


@pytest.mark.parametrize("dim", [4, 12, 50, 75, 128, 300, 500, 512, 600, 768, 1000, 1024])
def test_tiles_cover_every_group_in_powers_of_two(dim) -> None:
    """And no thread may take more registers than a block's share of them."""
    for groups, dtype in itertools.product((1, 2, 4, 5, 10, 64), (torch.float32, torch.float64)):
        if dim % groups:
            continue
        found = [tiles.step_tile(dim, groups, dtype, vjp) for vjp in (False, True)]
        for stored in {dtype, torch.bfloat16 if dtype == torch.float32 else dtype}:
            found.append(tiles.fuse_vjp_tile(dim, groups, dtype, stored))
        if tiles.fits_solve(dim, groups, dtype, 1):
            for m, cores in itertools.product((1, 3, 5), (False, True)):
                found.append(tiles.solve_tile(tiles.columns(dim, groups), m, cores))
        for tile in found:
            assert tile.padded >= dim // groups
            for number in (tile.rows, tile.groups, tile.padded, tile.inner, tile.warps):
                assert number == tiles.power_of_two(number)
            assert tile.columns >= 16
            assert (tile.registers or 0) * 32 * tile.warps <= tiles.REGISTERS
            if tiles.fits_whole(dim, groups):
                assert tile.groups >= groups
