"""The cuda backend's adjoints through the CUDA library's operators, here on the host policy."""

from __future__ import annotations

import logging

import pytest
import torch
from adjoint_cases import CASES, TOLERANCE, Case, adjoint_of, assert_equal, exact

from deqfuse import Implicit
from deqfuse.backends import cpu_native, cuda, cuda_adjoint, cuda_native, reference
from deqfuse.outcome import Outcome
from deqfuse.solvers.options import Neumann, OneStep

KINDS = ("cells", "shared", "fuse", "layer")
OTHERS = [OneStep(), Neumann(3), Implicit("neumann", tol=1e-10)]

HOST = torch.device("cpu")  # which plays a GPU here


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CUDA library were there: on CPU tensors its bodies run in the compiled module."""
    if cpu_native.module is None:
        pytest.skip("the C++ extension was not built")
    monkeypatch.setattr(cuda_native, "device_error", lambda index: None)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_reference(case: Case, kind: str) -> None:
    arguments = case.arguments(exact(case))[kind]
    given = adjoint_of(cuda.BACKEND, kind)(*arguments)
    expected = adjoint_of(reference.BACKEND, kind)(*arguments)
    assert (given[-1].outcome == Outcome.CONVERGED).all()
    assert_equal(given, expected, TOLERANCE[case.dtype])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("adjoint", OTHERS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_other_gradients(adjoint, kind: str) -> None:
    arguments = Case().arguments(adjoint)[kind]
    given = adjoint_of(cuda.BACKEND, kind)(*arguments)
    expected = adjoint_of(reference.BACKEND, kind)(*arguments)
    assert_equal(given, expected, 1e-9)


def test_tf32_is_asked_for_where_the_switch_allows_it_and_it_can_reach_the_tolerance() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        assert not cuda_adjoint._allow_tf32(Implicit(tol=1e-3))
        matmul.fp32_precision = "tf32"
        assert cuda_adjoint._allow_tf32(Implicit(tol=1e-3))
        assert not cuda_adjoint._allow_tf32(Implicit(tol=1e-5))
        assert cuda_adjoint._allow_tf32(OneStep())
    finally:
        matmul.fp32_precision = before


def test_a_missing_library_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_native, "device_error", lambda index: "it is on holiday")
    with caplog.at_level(logging.WARNING, "deqfuse"):
        assert not cuda_adjoint.library_takes(HOST, Implicit())
        assert not cuda_adjoint.library_takes(HOST, Implicit())
    assert caplog.text.count("it is on holiday. Remedy: DEQFUSE_BUILD=cuda") == 1


@pytest.mark.usefixtures("library")
def test_solvers_that_the_library_lacks_run_without_it() -> None:
    assert cuda_adjoint.library_takes(HOST, Implicit("bicgstab"))
    assert not cuda_adjoint.library_takes(HOST, Implicit("gmres"))
