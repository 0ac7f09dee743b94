"""The cuda backend's adjoints without the CUDA library: Triton's VJPs under the Krylov loop."""

from __future__ import annotations

import pytest
from adjoint_cases import CASES, TOLERANCE, Case, adjoint_of, assert_equal, exact
from triton_cases import upcast  # noqa: F401 - only under TRITON_INTERPRET=1

from deqfuse import Implicit
from deqfuse.backends import cuda, cuda_native, reference
from deqfuse.outcome import Outcome
from deqfuse.solvers.options import Neumann, OneStep


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_native, "load_error", lambda: "not in this test")


@pytest.mark.parametrize("kind", ["cells", "fuse", "layer"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_reference(case: Case, kind: str) -> None:
    arguments = case.arguments(exact(case))[kind]
    given = adjoint_of(cuda.BACKEND, kind)(*arguments)
    expected = adjoint_of(reference.BACKEND, kind)(*arguments)
    assert (given[-1].outcome == Outcome.CONVERGED).all()
    assert_equal(given, expected, TOLERANCE[case.dtype])


@pytest.mark.parametrize("adjoint", [OneStep(), Neumann(2), Implicit("gmres", tol=1e-10)], ids=repr)
@pytest.mark.parametrize("kind", ["shared", "fuse"])
def test_other_gradients(adjoint, kind: str) -> None:
    arguments = Case(rows=3, n=2).arguments(adjoint)[kind]
    given = adjoint_of(cuda.BACKEND, kind)(*arguments)
    expected = adjoint_of(reference.BACKEND, kind)(*arguments)
    assert_equal(given, expected, 1e-9)
