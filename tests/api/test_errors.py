"""Every refusal: its type, and that it names the argument, what was expected and what came."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from error_cases import DIM, ROWS, N, features, fusion, refused

from deqfuse import (
    DEQ,
    Anderson,
    Broyden,
    DEQFusion,
    DoubleBackwardError,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Picard,
    PurifyCombine,
    ResidualCell,
    Unrolled,
    checks,
)

# ---- options ------------------------------------------------------------------------------------

NOT_POSITIVE = [-1.0, 0.0, float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("option", [Anderson, Picard, Broyden, NewtonKrylov, Implicit])
class TestCommonOptions:
    @pytest.mark.parametrize("value", NOT_POSITIVE)
    def test_tol(self, option: type, value: float) -> None:
        with refused(ValueError, f"{option.__name__}(tol=...)", "finite number > 0", repr(value)):
            option(tol=value)

    @pytest.mark.parametrize("value", ["1e-4", None, True, [1e-4]], ids=repr)
    def test_type_of_tol(self, option: type, value: object) -> None:
        with refused(TypeError, f"{option.__name__}(tol=...)", "a number", repr(value)):
            option(tol=value)

    @pytest.mark.parametrize("value", [0, -3])
    def test_max_iter(self, option: type, value: int) -> None:
        with refused(ValueError, f"{option.__name__}(max_iter=...)", "an int >= 1", repr(value)):
            option(max_iter=value)

    @pytest.mark.parametrize("value", [True, 10.0, "10", None], ids=repr)
    def test_type_of_max_iter(self, option: type, value: object) -> None:
        with refused(TypeError, f"{option.__name__}(max_iter=...)", "an int", repr(value)):
            option(max_iter=value)

    @pytest.mark.parametrize("keyword", ["eps", "threshold", "tau", "history"])
    def test_unknown_keyword(self, option: type, keyword: str) -> None:
        with refused(TypeError, option.__name__, keyword):
            option(**{keyword: 1})


@pytest.mark.parametrize(
    ("make", "error", "parts"),
    [
        (lambda: Anderson(m=0), ValueError, ("Anderson(m=...)", "an int >= 1", "0")),
        (lambda: Anderson(m=True), TypeError, ("Anderson(m=...)", "an int", "True")),
        (lambda: Broyden(m=0), ValueError, ("Broyden(m=...)", "an int >= 1", "0")),
        (lambda: Broyden(m=2.0), TypeError, ("Broyden(m=...)", "an int", "2.0")),
        (lambda: Anderson(beta=0.0), ValueError, ("Anderson(beta=...)", "> 0", "0.0")),
        (lambda: Anderson(beta=2.5), ValueError, ("Anderson(beta=...)", "(0, 2]", "2.5")),
        (lambda: Picard(beta=-1.0), ValueError, ("Picard(beta=...)", "> 0", "-1.0")),
        (lambda: Picard(beta="1"), TypeError, ("Picard(beta=...)", "a number", "'1'")),
        (lambda: Anderson(lam=-1e-6), ValueError, ("Anderson(lam=...)", "-1e-06")),
        (lambda: Anderson(lam=float("nan")), ValueError, ("Anderson(lam=...)", "nan")),
        (lambda: Anderson(lam=False), TypeError, ("Anderson(lam=...)", "a number", "False")),
        (lambda: Anderson(rescue=1), TypeError, ("Anderson(rescue=...)", "False or None", "1")),
        (lambda: Picard(trace="yes"), TypeError, ("Picard(trace=...)", "True or False", "'yes'")),
        (lambda: NewtonKrylov(restart=0), ValueError, ("NewtonKrylov(restart=...)", ">= 1", "0")),
        (lambda: Neumann(k=0), ValueError, ("Neumann(k=...)", "an int >= 1", "0")),
        (lambda: Neumann(k=True), TypeError, ("Neumann(k=...)", "an int", "True")),
        (lambda: Implicit(solver="cg"), ValueError,
         ("Implicit(solver=...)", "'auto', 'gmres', 'bicgstab'", "'neumann', 'dense', got 'cg'")),
        (lambda: Implicit(solver=None), ValueError, ("Implicit(solver=...)", "None")),
        (lambda: OneStep(k=1), TypeError, ("OneStep", "k")),
        (lambda: Unrolled(steps=1), TypeError, ("Unrolled", "steps")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_particular_options(
    make: Callable[[], object], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with refused(error, *parts):
        make()


def test_replace_checks_too() -> None:
    with refused(ValueError, "Anderson(tol=...)"):
        dataclasses.replace(Anderson(), tol=-1.0)


def test_zero_ridge_is_an_option() -> None:
    assert Anderson(lam=0).lam == 0


def test_numpys_numbers_are_numbers() -> None:
    np = pytest.importorskip("numpy")
    option = Anderson(tol=np.float32(0.5), max_iter=np.int64(7), lam=np.float64(0), m=np.uint8(3))
    assert option == Anderson(tol=0.5, max_iter=7, lam=0.0, m=3)
    assert option.code == Anderson(tol=0.5, max_iter=7, lam=0.0, m=3).code
    layer = DEQFusion(np.int64(DIM), np.int32(N), num_groups=np.int64(2), in_dims=[5] * N)
    assert layer([torch.ones(ROWS, 5)] * N).shape == (ROWS, DIM)
    with refused(TypeError, "dim", "an int", "8.0"):
        DEQFusion(np.float64(DIM), N)
    with refused(TypeError, "Anderson(tol=...)", "a number", "True"):
        Anderson(tol=np.True_)
    with refused(ValueError, "Anderson(m=...)", "an int >= 1", "0"):
        Anderson(m=np.int64(0))


# ---- what every module takes --------------------------------------------------------------------

MAKERS = [
    pytest.param(lambda **kw: fusion(**kw), id="DEQFusion"),
    pytest.param(lambda **kw: DEQ(lambda z: z, **kw), id="DEQ"),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"solver": "anderson"}, TypeError, ("solver", "Anderson(...)", "'anderson'")),
        ({"solver": Anderson}, TypeError, ("solver", "Anderson(...)", "class")),
        ({"solver": Implicit()}, TypeError, ("solver", "Anderson(...)", "Implicit(")),
        ({"solver": None}, TypeError, ("solver", "None")),
        ({"adjoint": "implicit"}, TypeError, ("adjoint", "Implicit(...)", "'implicit'")),
        ({"adjoint": Anderson()}, TypeError, ("adjoint", "Implicit(...)", "Anderson(")),
        ({"on_failure": "wran"}, ValueError, ("on_failure", "'warn', 'raise', 'ignore'", "'wran'")),
        ({"on_failure": None}, ValueError, ("on_failure", "None")),
        ({"solver": NewtonKrylov(), "adjoint": Unrolled()}, ValueError,
         ("Unrolled()", "autograd cannot follow", "NewtonKrylov(", "Remedy: Implicit()")),
        ({"solver": Anderson(rescue=True), "adjoint": Unrolled()}, ValueError,
         ("Unrolled()", "autograd cannot follow", "rescue=True", "Remedy")),
        ({"tol": 1e-3}, TypeError, ("tol",)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_solver_options(
    make: Callable[..., object],
    options: dict[str, Any],
    error: type[Exception],
    parts: tuple[str, ...],
) -> None:
    with refused(error, *parts):
        make(**options)


# ---- construction of the layer ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"num_groups": 3}, ValueError, ("num_groups", "divisor of dim=8", "3", "[1, 2, 4]")),
        ({"num_groups": 0}, ValueError, ("num_groups", "an int >= 1", "0")),
        ({"num_groups": 2.0}, TypeError, ("num_groups", "an int", "2.0")),
        ({"num_groups": True}, TypeError, ("num_groups", "an int", "True")),
        ({"cell": "lstm"}, ValueError, ("cell", "'residual', 'identity'", "'lstm'")),
        ({"combine": "mean"}, ValueError, ("combine", "'purify', 'sum', 'weighted_sum'", "'mean'")),
        ({"variant": "v2"}, ValueError, ("variant", "'released-mmimdb'", "'v2'")),
        ({"init": "xavier"}, ValueError, ("init", "'contractive', 'torch'", "'xavier'")),
        ({"backend": "gpu"}, ValueError, ("backend", "'auto'", "'reference'", "'gpu'")),
        ({"weight_tied_steps": 0}, ValueError, ("weight_tied_steps", ">= 1", "0")),
        ({"weight_tied_steps": True}, TypeError, ("weight_tied_steps", "an int", "True")),
        ({"weight_tied_steps": 2.5}, TypeError, ("weight_tied_steps", "an int", "2.5")),
        ({"dropout": 1.0}, ValueError, ("dropout", "[0, 1)", "1.0")),
        ({"dropout": -0.1}, ValueError, ("dropout", "[0, 1)", "-0.1")),
        ({"dropout": float("nan")}, ValueError, ("dropout", "[0, 1)", "nan")),
        ({"dropout": "0.5"}, TypeError, ("dropout", "number", "'0.5'")),
        ({"in_dims": [3]}, ValueError, ("in_dims", "num_modalities=2", "1")),
        ({"in_dims": [3, 0]}, ValueError, ("in_dims[1]", ">= 1", "0")),
        ({"in_dims": [3, True]}, TypeError, ("in_dims[1]", "an int", "True")),
        ({"in_dims": 5}, TypeError, ("in_dims", "sequence", "got int")),
        ({"gate": "no"}, TypeError, ("gate", "True or False", "'no'")),
        ({"injection_norm": 3}, TypeError, ("injection_norm", "True or False", "3")),
        ({"dimm": 5}, TypeError, ("dimm",)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_layer_options(
    options: dict[str, Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with refused(error, *parts):
        fusion(**options)


@pytest.mark.parametrize("value", [0, -1])
def test_sizes(value: int) -> None:
    with refused(ValueError, "dim", "an int >= 1", str(value)):
        DEQFusion(value, N)
    with refused(ValueError, "num_modalities", "an int >= 1", str(value)):
        DEQFusion(DIM, value)
    with refused(ValueError, "num_modalities", "an int >= 1", str(value)):
        PurifyCombine(DIM, value)


@pytest.mark.parametrize("value", [True, 8.0, "8", None], ids=repr)
def test_types_of_sizes(value: object) -> None:
    with refused(TypeError, "dim", "an int", repr(value)):
        DEQFusion(value, N)  # type: ignore[arg-type]
    with refused(TypeError, "num_modalities", "an int", repr(value)):
        DEQFusion(DIM, value)  # type: ignore[arg-type]
    with refused(TypeError, "dim", "an int", repr(value)):
        ResidualCell(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [ResidualCell, lambda dim, **kw: PurifyCombine(dim, N, **kw)],
                         ids=["ResidualCell", "PurifyCombine"])  # fmt: skip
def test_building_blocks(make: Callable[..., object]) -> None:
    with refused(ValueError, "num_groups", "divisor of dim=8", "5"):
        make(DIM, num_groups=5)
    with refused(ValueError, "variant", "'paper'", "'bogus'"):
        make(DIM, variant="bogus")
    with refused(ValueError, "init", "'contractive'", "'bogus'"):
        make(DIM, init="bogus")


# ---- inputs of the layer ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "parts"),
    [
        (features()[:1], ValueError, ("features", "num_modalities=2", "1 tensors")),
        ([*features(), torch.ones(ROWS, DIM)], ValueError, ("features", "2", "3 tensors")),
        ([], ValueError, ("features", "num_modalities=2", "0 tensors")),
        (torch.ones(N, ROWS, DIM), ValueError, ("features", "a single tensor")),
        (None, TypeError, ("features", "sequence", "got NoneType")),
        (iter(features()), TypeError, ("features", "list_iterator. Remedy: list(features)")),
        (dict(enumerate(features())), TypeError, ("got dict. Remedy: list(features.values())",)),
        ("ab", TypeError, ("features", "torch.Tensor", "str")),
        ([features()[0], None], TypeError, ("features[1]", "torch.Tensor", "NoneType")),
        ([features()[0], [[1.0] * DIM] * ROWS], TypeError, ("features[1]", "Tensor", "list")),
        ([features()[0], torch.ones(ROWS, 7)], ValueError, ("features[1]", "(3, 8)", "(3, 7)")),
        ([features()[0], torch.ones(4, DIM)], ValueError, ("features[1]", "(3, 8)", "(4, 8)")),
        ([torch.ones(ROWS, 7), features()[1]], ValueError, ("features[0]", "(3, 8)", "(3, 7)")),
        ([features()[0], torch.ones(1, ROWS, DIM)], ValueError, ("features[1]", "(1, 3, 8)")),
        ([torch.ones(()), features()[1]], ValueError, ("features[0]", "scalar")),
        ([features()[0].to_sparse(), features()[1]], TypeError,
         ("features[0]", "a dense tensor", "torch.sparse_coo", "features[0].to_dense()")),
        ([features()[0], torch.nested.nested_tensor(features(), layout=torch.jagged)], TypeError,
         ("features[1]", "a dense tensor", "nested", "to_padded_tensor(features[1], 0.0)")),
        (features(torch.int64), TypeError, ("features[0]", "floating-point", "int64", ".float()")),
        (features(torch.bool), TypeError, ("features[0]", "floating-point", "torch.bool")),
        (features(torch.complex64), TypeError, ("features[0]", "floating-point", "complex64")),
        (features(torch.float64), TypeError,
         ("features[0]", "torch.float32", "torch.float64", "Remedy")),
        ([features()[0], features(torch.float16)[1]], TypeError,
         ("features[1]", "torch.float32", "torch.float16", "Remedy")),
        (features(device="meta"), ValueError, ("features[0]", "device cpu", "meta", "Remedy")),
        ([features()[0], features(device="meta")[1]], ValueError,
         ("features[1]", "device cpu", "meta", ".to('cpu')")),
    ],
)  # fmt: skip
def test_features(given: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    with refused(error, *parts):
        fusion()(given)


def test_features_of_a_layer_without_parameters() -> None:
    layer = fusion(cell="identity", combine="sum")
    assert not list(layer.parameters())
    with refused(TypeError, "features[1]", "torch.float32", "torch.float64"):
        layer([features()[0], features(torch.float64)[1]])


def test_projected_widths() -> None:
    layer = fusion(in_dims=[3, 5])
    with refused(ValueError, "features[1]", "(3, 5)", "(3, 8)"):
        layer([torch.ones(ROWS, 3), torch.ones(ROWS, DIM)])


START = (torch.zeros(ROWS, DIM), torch.zeros(N, ROWS, DIM))


@pytest.mark.parametrize(
    ("z0", "error", "parts"),
    [
        (START[0], TypeError, ("z0", "a pair (fused, cells)", "Tensor")),
        (START[:1], TypeError, ("z0", "a pair")),
        ((START[0], None), TypeError, ("z0[1]", "torch.Tensor", "NoneType")),
        (START[::-1], ValueError, ("z0[0]", "(3, 8)", "(2, 3, 8)")),
        ((START[0], START[1][:1]), ValueError, ("z0[1]", "(2, 3, 8)", "(1, 3, 8)")),
        ((START[0][:1], START[1]), ValueError, ("z0[0]", "(3, 8)", "(1, 8)")),
        ((START[0].long(), START[1]), TypeError, ("z0[0]", "floating-point", "int64")),
        ((START[0].to("meta"), START[1]), ValueError, ("z0[0]", "device cpu", "meta")),
        ((START[0], START[1].to("meta")), ValueError, ("z0[1]", "device cpu", "meta")),
    ],
)
def test_warm_starts(z0: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    with refused(error, *parts):
        fusion()(features(), z0=z0)


def test_no_warm_start_for_weight_tied_steps() -> None:
    with refused(ValueError, "z0", "weight_tied_steps"):
        fusion(weight_tied_steps=2)(features(), z0=START)


def test_no_cells_of_a_weighted_sum() -> None:
    with refused(ValueError, "return_cells", "weighted_sum"):
        fusion(combine="weighted_sum")(features(), return_cells=True)


# ---- diagnostics, checks, error types -----------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (True, TypeError), ("2", TypeError), (1.5, TypeError)]
)
def test_probe_counts(value: Any, error: type[Exception]) -> None:
    _, info = fusion()(features(), return_info=True)
    with refused(error, "num_probes", "an int", repr(value)):
        info.jacobian_penalty(value)
    with refused(error, "num_iters", "an int", repr(value)):
        info.spectral_radius(value)


def test_tensor_check_accepts_what_autocast_will_cast() -> None:
    half = torch.ones(2, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checks.tensor("x", half, like=torch.ones(2))
    with refused(TypeError, "x", "float32", "bfloat16"):
        checks.tensor("x", half, like=torch.ones(2))


def test_double_backward_error_names_the_way_out() -> None:
    x = features()
    x[0].requires_grad_()
    z = fusion()(x)
    for loss in (z.sum(), z.square().sum()):
        (grad,) = torch.autograd.grad(loss, x[0], create_graph=True, retain_graph=True)
        with refused(DoubleBackwardError, "second derivative", "Remedy", "adjoint=Unrolled()"):
            grad.square().sum().backward()


# ---- options without effect, degenerate sizes ----------------------------------------------------


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"gate": False}], ids=str)
@pytest.mark.parametrize("combine", ["sum", "weighted_sum"])
def test_options_that_would_have_no_effect(combine: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"combine: dropout and gate belong to combine='purify'"):
        DEQFusion(8, 2, combine=combine, **options)


def test_groups_of_one_feature_are_pointed_out() -> None:
    with pytest.warns(UserWarning, match=r"groups of one feature.*fewer groups"):
        DEQFusion(4, 2, num_groups=4)
