"""The whole and the stepped solves behind the cuda backend; under Triton's interpreter."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections import deque

import pytest
import torch
from test_triton_cases import Case as Operands
from test_triton_cases import poison  # noqa: F401 - a fixture
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deqfuse import Anderson, Broyden, DEQFusion, Implicit, Outcome, Picard, Unrolled, reporting
from deqfuse.backends import Problem, cuda, reference
from deqfuse.backends.problem import Solved
from deqfuse.triton_kernels import tiles
from deqfuse.triton_kernels.launch import Launch, counted, intercept

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poison")]


@dataclasses.dataclass(frozen=True)
class Case(Operands):
    init: str = "contractive"
    start: bool = False

    def layer(self) -> DEQFusion:
        """Every parameter is away from its initial zeros and ones."""
        torch.manual_seed(1000 * self.dim + self.n)
        given = {"num_groups": self.groups, "variant": self.variant, "init": self.init}
        layer = DEQFusion(self.dim, self.n, **given).requires_grad_(False)
        for part in layer.modules():
            if isinstance(part, torch.nn.GroupNorm):
                part.weight.uniform_(0.6, 1.4)
                part.bias.uniform_(-0.3, 0.3)
        if self.variant != "paper":
            for cell in layer.cells:
                cell.norm3.weight.mul_(0.1)
        return layer.to(self.draw(1).dtype)

    def solves(self, backend) -> list[functools.partial]:
        """Both solves, as functions of the solver."""
        layer = self.layer()
        x, cell_sum = self.draw(self.n), self.draw(stored=False)
        z0 = self.draw(self.n) if self.start else None
        flat = [t for part in layer.cells for t in part.flat()]
        rest = (self.groups, self.variant)
        z0_fuse = None if z0 is None else z0[0]
        fuse = (x.sum(0), cell_sum, layer.combine.flat(), self.drop(), z0_fuse, self.n)
        return [
            functools.partial(backend.solve_cells, x, flat, z0, *rest),
            functools.partial(backend.solve_fuse, *fuse, *rest),
        ]

    def whole_layer(self, backend) -> functools.partial:
        """The layer's solve, as a function of the solver."""
        layer = self.layer()
        flat = [t for part in (*layer.cells, layer.combine) for t in part.flat()]
        flat.append(torch.rand(self.n).to(flat[0]) + 0.5)
        flat += [torch.tensor(0.3).to(flat[0])] if self.variant != "paper" else []
        z0 = self.draw(self.n) if self.start else None
        z0_fuse = None if z0 is None else z0[0]
        fixed = (flat, self.drop(), z0_fuse, z0, self.groups, self.variant)
        return functools.partial(backend.solve_layer, list(self.draw(self.n)), *fixed)


def both(case: Case, solver) -> list[tuple]:
    pairs = zip(case.solves(cuda), case.solves(reference), strict=True)
    return [(mine(solver), wanted(solver)) for mine, wanted in pairs]


def assert_same(given, expected, solver, steps: int = 1) -> None:
    """Each answer lies within a few of its own residuals of the equilibrium.

    ``|z_a - z_b| <= L / (1 - L) (r_a + r_b) |z|``; the contraction factors L met here are below
    0.8. Rounding may move the end of a row by ``steps`` evaluations.
    """
    for mine, wanted in zip(given, expected, strict=True):
        assert (mine.shape, mine.dtype) == (wanted.shape, wanted.dtype)
    assert (expected.outcome == Outcome.CONVERGED).all()
    assert (given.outcome == Outcome.CONVERGED).all()
    assert (given.residual <= solver.tol).all()
    assert (given.nfe - expected.nfe).abs().max() <= steps
    limit = 4 * (given.residual + expected.residual)
    assert ((given.z - expected.z).norm(dim=-1) <= limit * expected.z.norm(dim=-1)).all()


WHOLE = [
    *(Case(dtype="f32", rows=r, n=n) for r, n in ((1, 1), (8, 2), (17, 3))),
    *(
        Case(dtype="f32", rows=5, dim=d, groups=g)
        for d, g in ((20, 5), (50, 2), (64, 1), (96, 4), (128, 4))
    ),
    *(Case(dtype=t, variant=v) for t in ("bf16", "f16") for v in ("paper", "released")),
    Case(dtype="f32", variant="released", mask=True, start=True),
    Case(dtype="f32", variant="released-mmimdb", mask=True, start=True),
]
STEPPED = [
    Case(rows=2, dim=160, groups=10, dtype="bf16", mask=True, start=True),
    Case(rows=3, variant="released", start=True),
    Case(rows=3, variant="released-mmimdb", mask=True),
    pytest.param(Case(rows=3, dim=300, groups=4, dtype="f32"), marks=pytest.mark.slow),
    pytest.param(Case(rows=35), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_whole_solves(case: Case) -> None:
    solver = Anderson(tol=1e-5)
    assert cuda.one_launch(case.draw(), case.groups, solver)
    for given, expected in both(case, solver):
        assert_same(given, expected, solver)


@pytest.mark.parametrize("case", STEPPED, ids=str)
def test_stepped_solves(case: Case) -> None:
    solver = Anderson(tol=1e-8 if case.dtype == "f64" else 1e-5, max_iter=40)
    assert not cuda.one_launch(case.draw(), case.groups, solver)
    for given, expected in both(case, solver):
        assert_same(given, expected, solver)


LAYERS = [
    Case(dtype="f32", rows=17, n=3, dim=50, groups=2),
    Case(dtype="f32", rows=9, n=1, variant="released", start=True, mask=True),
    Case(dtype="bf16", rows=3, variant="released-mmimdb", mask=True),
    Case(rows=3, variant="released"),  # float64: block by block
]


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_the_whole_layer(case: Case) -> None:
    solver = Anderson(tol=1e-5)
    given = case.whole_layer(cuda)(solver)
    expected = case.whole_layer(reference)(solver)
    assert_same(Solved(*given[1:]), Solved(*expected[1:]), solver)
    assert torch.equal(given.z, given.states[-1])
    assert given.z.data_ptr() != given.states[-1].data_ptr()


SOLVERS = [
    *(Anderson(m=m, tol=1e-5) for m in (1, 2, 3, 4)),
    Anderson(beta=0.6, tol=1e-5),
    Anderson(lam=1e-3, tol=1e-5),
    Picard(tol=1e-5),
    Picard(beta=0.7, tol=1e-5),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_whole_solvers(solver) -> None:
    for given, expected in both(Case(dtype="f32", rows=9), solver):
        assert_same(given, expected, solver)


@pytest.mark.parametrize("dtype", ["f32", "f64"], ids=["whole", "stepped"])
@pytest.mark.parametrize(
    "solver", [Anderson(max_iter=8), Anderson(max_iter=1), Picard(max_iter=6)], ids=repr
)
def test_statistics_are_those_of_the_reference(solver, dtype) -> None:
    """At torch's init rows end in several ways. Over 8 steps rounding stays small."""
    rtol = 1e-6 if dtype == "f64" else 1e-2
    rows = 20 if dtype == "f32" else 6
    case = Case(rows=rows, dim=20, groups=5, dtype=dtype, init="torch")
    for given, expected in both(case, solver):
        steady = torch.isclose(given.residual, expected.residual, rtol=rtol, atol=0)
        assert steady.double().mean() >= 0.9
        assert torch.equal(given.nfe[steady], expected.nfe[steady])
        assert torch.equal(given.outcome[steady], expected.outcome[steady])
        near = (given.z - expected.z).norm(dim=-1) <= rtol * expected.z.norm(dim=-1)
        assert near[steady].all()


def test_traces_are_those_of_the_reference() -> None:
    solver = Anderson(max_iter=8, trace=True)
    for given, expected in both(Case(rows=5, dim=20, groups=5, init="torch"), solver):
        assert torch.equal(given.trace.isfinite().sum(0), given.nfe)
        torch.testing.assert_close(
            given.trace, expected.trace, rtol=1e-6, atol=1e-9, equal_nan=True
        )


def test_a_row_that_finds_nothing_better_has_stalled() -> None:
    solver, case = Picard(max_iter=60), Case(rows=24, dtype="f32", init="torch")
    given, expected = both(case, solver)[1]
    stalled = expected.outcome == Outcome.STALLED
    assert stalled.any()
    agree = (given.outcome == Outcome.STALLED) == stalled
    assert agree.double().mean() >= 0.9, "rounding decides a few"


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("dtype", ["f32", "f64"], ids=["whole", "stepped"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_poisoned_row_stays_alone(value, dtype) -> None:
    solver = Anderson(tol=1e-5, max_iter=6)
    for clean, mine, wanted in zip(
        Case(rows=5, dtype=dtype, n=1).solves(cuda),
        Case(rows=5, dtype=dtype, n=1).solves(cuda),
        Case(rows=5, dtype=dtype, n=1).solves(reference),
        strict=True,
    ):
        mine.args[0][..., 3, 1] = wanted.args[0][..., 3, 1] = value
        given, expected, healthy = mine(solver), wanted(solver), clean(solver)
        assert (given.outcome[..., 3] == Outcome.NON_FINITE).all()
        assert torch.equal(given.outcome, expected.outcome)
        assert torch.equal(given.nfe[..., 3], expected.nfe[..., 3])
        assert given.z[..., 3, :].isnan().any()
        assert torch.equal(given.z.isnan(), expected.z.isnan())
        others = [0, 1, 2, 4]
        assert torch.equal(given.z[..., others, :], healthy.z[..., others, :])


@pytest.mark.parametrize("dim", [20, 160], ids=["whole", "stepped"])
def test_a_row_does_not_depend_on_its_batch(dim: int) -> None:
    case = Case(rows=21, dim=dim, groups=5, dtype="f32", n=1)
    solver = Anderson(max_iter=8 if dim == 20 else 2)
    for solve in case.solves(cuda):
        together = solve(solver)
        for part in (slice(0, 1), slice(15, 18)):
            pick = [
                t[..., part, :] if isinstance(t, torch.Tensor) and t.shape[-2] == 21 else t
                for t in solve.args
            ]
            alone = solve.func(*pick, solver)
            assert torch.equal(alone.z, together.z[..., part, :])
            assert torch.equal(alone.nfe, together.nfe[..., part])


@pytest.mark.parametrize("dtype", ["f32", "f64"], ids=["whole", "stepped"])
def test_rescue_takes_over_what_is_left(dtype) -> None:
    case = Case(rows=6, dtype=dtype, init="torch")
    solver = Anderson(max_iter=5, rescue=True, trace=dtype == "f64")
    for solve in case.solves(cuda):
        before, after = solve(dataclasses.replace(solver, rescue=False)), solve(solver)
        failed = before.outcome != Outcome.CONVERGED
        assert failed.any()
        assert (after.outcome != Outcome.CONVERGED).sum() < failed.sum()
        assert torch.equal(after.z[~failed], before.z[~failed])
        assert len(after.trace) == (solver.trace_length if solver.trace else 0)


def test_strides_do_not_matter() -> None:
    case, solver = Case(dtype="f32", mask=True, start=True), Anderson()
    for solve in case.solves(cuda):

        def strange(t):
            if isinstance(t, list):
                return [strange(p) for p in t]
            if not isinstance(t, torch.Tensor) or t.dim() < 2:
                return t
            return torch.stack([t.mT, t.mT], dim=-1)[..., 1].mT

        plain, other = solve(solver), solve.func(*map(strange, solve.args), solver)
        assert torch.equal(other.z, plain.z)


@pytest.mark.parametrize("dtype", ["f32", "f64"], ids=["whole", "stepped"])
def test_no_rows(dtype) -> None:
    for solve in Case(rows=0, dtype=dtype).solves(cuda):
        with counted() as names:
            solved = solve(Anderson())
        assert names == []
        assert solved.z.shape[-2] == 0
        assert solved.outcome.shape == solved.z.shape[:-1]


# ---- launches ------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Names of PyTorch's operations that would launch something on a device."""

    FREE = ("empty", "view", "reshape", "alias", "expand", "select", "detach", "slice", "t")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not any(free in name.split("_") for free in self.FREE):
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


def test_nothing_in_the_module_adds_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of ``DEQFusion.forward``, on the backend that tensors on a GPU would take."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "refuses", cuda.refuses_problem)
    layer = DEQFusion(12, 3, num_groups=2, on_failure="ignore", backend="cuda")
    xs = list(torch.randn(3, 5, 12))
    for params_need_gradients in (False, True):
        layer.requires_grad_(params_need_gradients)
        launches: list[Launch] = []
        with intercept(launches.append), Operations() as operations:
            layer(xs)
        assert [call.name for call in launches] == ["_solve_cells_kernel", "_solve_fuse_kernel"]
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
    late: deque = deque()
    monkeypatch.setattr(reporting, "_late", late)
    with FakeTensorMode():
        outcome = torch.zeros(4, 5, dtype=torch.int8, device="cuda")
        residual = torch.zeros(4, 5, device="cuda")
        with Operations() as operations:
            reporting.report_layer(outcome, residual, Anderson(), "warn", backward=backward)
    launched = [name for name in operations.names if name != "device"]  # a fake tensor's own
    assert launched == ["_to_copy", "_to_copy"]
    assert events == ["record"]
    assert [item.summary.outcome.shape for item in late] == [(5,), (3, 5)][:: 1 if backward else -1]
    assert all(item.summary.residual.device.type == "cpu" for item in late)


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
    ],
    ids=repr,
)
def test_what_it_cannot_do_is_refused_by_name(changes, reason) -> None:
    assert cuda.refuses_problem(problem()) is None
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


@pytest.mark.parametrize("dim", [4, 12, 50, 75, 300, 500, 512, 768, 1000, 1024])
def test_tiles_cover_every_group_in_powers_of_two(dim) -> None:
    dtypes = (torch.float32, torch.float64)
    for groups, dtype, vjp in itertools.product((1, 2, 4, 5, 10, 64), dtypes, (False, True)):
        if dim % groups:
            continue
        tile = tiles.step_tile(dim, groups, dtype, vjp)
        assert tile.padded >= dim // groups
        for number in (tile.rows, tile.groups, tile.padded, tile.inner, tile.warps):
            assert number == tiles.power_of_two(number)
        assert tile.columns >= 16
        if tiles.fits_whole(dim, groups):
            assert tile.groups >= groups


def test_anderson_on_rows_of_any_map() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    option = Anderson(tol=1e-9, trace=True)
    given = cuda.anderson(lambda z: 0.5 * z.cos() + x, torch.zeros_like(x), option)
    expected = reference.solve(lambda z: 0.5 * z.cos() + x, torch.zeros_like(x), option)
    torch.testing.assert_close(given.z, expected.z, rtol=1e-9, atol=1e-9)
    assert torch.equal(given.nfe, expected.nfe)
    torch.testing.assert_close(given.trace, expected.trace, rtol=1e-6, atol=1e-12, equal_nan=True)
