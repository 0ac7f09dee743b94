"""What is said about rows that did not converge: at once, late, or not at all, as asked."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from report_cases import SLOPES, START, X, failing, rotating
from torch import Tensor

from deqfuse import (
    DEQ,
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    DEQFusion,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Outcome,
    Picard,
)
from deqfuse.solvers.options import SolverOption

# ---- forward ------------------------------------------------------------------------------------


def test_warning_names_rows_residual_tolerance_and_knob() -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        _, info = failing("warn", adjoint=OneStep())(START, X)
    (message,) = [str(w.message) for w in caught]
    worst = float(info.fuse.residual[~info.converged].max())
    assert "2 of 3 rows" in message
    assert "2 used up their evaluations" in message
    assert f"{worst:.1e}" in message
    assert "tol 1.0e-03" in message
    assert "Picard(max_iter=24)" in message
    assert "on_failure='ignore'" in message


def test_raise_carries_the_same_message() -> None:
    with pytest.raises(
        ConvergenceError, match=r"2 of 3 rows .* tol 1\.0e-03.*Picard\(max_iter=24\)"
    ):
        failing("raise")(START, X)


def test_ignore_is_silent_and_info_is_true() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, info = failing("ignore")(START, X)
    assert info.converged.tolist() == [True, False, False]


@pytest.mark.parametrize("on_failure", ["warn", "raise", "ignore"])
def test_silence_when_all_rows_converge(on_failure: str) -> None:
    deq = DEQ(rotating([0.1, 0.2, 0.3]), on_failure=on_failure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z, info = deq(START, X.clone().requires_grad_())
        z.backward(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    assert info.converged.all()


@pytest.mark.parametrize(
    ("solver", "knob"),
    [
        (Anderson(max_iter=3, m=1), "Anderson(max_iter=6)"),
        (Picard(max_iter=3), "Picard(max_iter=6)"),
        (Broyden(max_iter=3), "Broyden(max_iter=6)"),
        (NewtonKrylov(max_iter=3), "NewtonKrylov(max_iter=6)"),
    ],
)
def test_the_knob_is_that_of_the_solver(solver: SolverOption, knob: str) -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        failing("warn", solver=solver)(START, X)
    assert knob in str(caught[0].message)


def test_each_way_to_fail_is_told_apart() -> None:
    x = X.clone()
    x[0, 0] = torch.nan
    with pytest.warns(ConvergenceWarning) as caught:
        _, info = failing("warn", solver=Picard(max_iter=500))(START, x)
    assert info.fuse.outcome.tolist() == [Outcome.NON_FINITE, Outcome.STALLED, Outcome.STALLED]
    message = str(caught[0].message)
    assert "3 of 3 rows" in message
    assert "2 stalled" in message
    assert "1 became NaN or infinite (check the input)" in message
    assert "nan" not in message.split("residual")[1], "the worst residual is that of a finite row"


def test_layer_names_its_blocks() -> None:
    torch.manual_seed(0)
    solver = Anderson(tol=1e-7, max_iter=1, rescue=False)
    layer = DEQFusion(8, 2, num_groups=2, solver=solver)
    xs = [torch.randn(5, 8) for _ in range(2)]
    with pytest.warns(ConvergenceWarning) as caught:
        layer(xs)
    messages = [str(w.message) for w in caught]
    assert any("10 of 10 rows of the modality cells" in m for m in messages)
    assert any("5 of 5 rows of the fuse block" in m for m in messages)
    layer.on_failure = "raise"
    with pytest.raises(ConvergenceError, match="10 of 10 rows of the modality cells"):
        layer(xs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_reports_do_not_depend_on_the_mode(training: bool, grad: bool) -> None:
    deq = failing("warn", adjoint=OneStep()).train(training)
    with torch.set_grad_enabled(grad), pytest.warns(ConvergenceWarning, match="2 of 3 rows"):
        z, _ = deq(START, X.clone().requires_grad_())
    assert z.requires_grad == grad


def test_no_report_for_an_empty_batch() -> None:
    deq = DEQ(lambda z: z, on_failure="raise")
    deq(torch.zeros(0, 2))


# ---- backward -----------------------------------------------------------------------------------


def backward(on_failure: str, adjoint: Any, slopes: list[float] = SLOPES) -> Tensor:
    """A forward solve that starts at its solution, and one backward pass."""
    f = rotating(slopes)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    star = torch.stack(
        [torch.linalg.solve(torch.eye(2) - s * turn, x) for s, x in zip(slopes, X, strict=True)]
    )
    x = X.clone().requires_grad_()
    z, info = DEQ(f, adjoint=adjoint, on_failure=on_failure)(star, x)
    assert info.converged.all()
    (grad,) = torch.autograd.grad(z, x, torch.tensor([[1.0, 2.0], [0.3, 1.0], [1.0, -1.0]]))
    return grad


SHORT = Implicit(solver="neumann", tol=1e-4, max_iter=8)


def test_backward_warning() -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        backward("warn", SHORT)
    (message,) = [str(w.message) for w in caught]
    assert "2 of 3 rows of the backward solve" in message
    assert "tol 1.0e-04" in message
    assert "gradient is inexact" in message
    assert "Implicit(max_iter=16)" in message


def test_backward_raise_and_ignore() -> None:
    with pytest.raises(ConvergenceError, match="2 of 3 rows of the backward solve"):
        backward("raise", SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(backward("ignore", SHORT)).all()


@pytest.mark.parametrize("adjoint", [Implicit(), Implicit(solver="dense")], ids=repr)
def test_backward_is_silent_when_solved(adjoint: Implicit) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward("warn", adjoint)


@pytest.mark.parametrize("adjoint", [OneStep(), Neumann(k=2)], ids=repr)
def test_approximations_have_nothing_to_report(adjoint: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward("raise", adjoint)


def test_backward_tolerance_is_never_looser_than_the_forward() -> None:
    """The message shows the tolerance in force: the forward's 1e-9, not the adjoint's 1e-2."""
    deq = DEQ(
        lambda z, x: torch.tanh(0.9 * z + x),
        solver=Anderson(tol=1e-9, max_iter=200),
        adjoint=Implicit(solver="neumann", tol=1e-2, max_iter=3),
    )
    x = torch.full((2, 2), 0.1, dtype=torch.float64, requires_grad=True)
    z, _ = deq(torch.zeros_like(x), x)
    with pytest.warns(ConvergenceWarning, match=r"tol 1\.0e-09"):
        z.backward(torch.ones_like(z))


def test_layer_reports_its_backward_blocks() -> None:
    torch.manual_seed(0)
    adjoint = Implicit(solver="anderson", max_iter=2)
    layer = DEQFusion(8, 2, num_groups=2, solver=Anderson(tol=1e-5), adjoint=adjoint)
    z = layer([torch.randn(5, 8) for _ in range(2)])
    with pytest.warns(ConvergenceWarning) as caught:
        z.backward(torch.randn(5, 8))
    text = " ".join(str(w.message) for w in caught)
    assert "the backward solve of the fuse block" in text
    assert "the backward solve of the modality cells" in text
    assert "Implicit(max_iter=4)" in text


def test_layer_raises_in_backward() -> None:
    torch.manual_seed(0)
    layer = DEQFusion(
        8,
        2,
        num_groups=2,
        solver=Anderson(tol=1e-5),
        adjoint=Implicit(solver="anderson", max_iter=2),
        on_failure="raise",
    )
    z = layer([torch.randn(5, 8) for _ in range(2)])
    with pytest.raises(ConvergenceError, match="backward solve of the fuse block"):
        z.backward(torch.randn(5, 8))


def test_nan_cotangent_is_reported() -> None:
    x = X.clone().requires_grad_()
    z, _ = DEQ(rotating([0.1, 0.2, 0.3]))(START, x)
    g = torch.ones(3, 2)
    g[1, 0] = torch.nan
    with pytest.warns(ConvergenceWarning, match="1 of 3 rows.*1 became NaN or infinite"):
        z.backward(g)
