"""What a warning advises: remedies that fit the solver, the map and the failure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deqfuse import DEQ, Anderson, ConvergenceWarning, DEQFusion, Picard


def message_of(call: Any) -> str:
    with pytest.warns(ConvergenceWarning) as caught:
        call()
    return str(caught[0].message)


def test_poisoned_rows_get_no_solver_advice() -> None:
    text = message_of(lambda: DEQ(lambda z: z * torch.nan)(torch.ones(2, 3)))
    assert "2 became NaN or infinite (check the input)" in text
    assert "Remedies" not in text


def test_a_callable_is_not_told_about_the_layer() -> None:
    text = message_of(lambda: DEQ(lambda z: 1 - 2 * z.sin(), solver=Picard())(torch.ones(2, 3)))
    assert "Picard(max_iter=100)" in text
    assert "contractive" not in text


def test_the_initialisation_is_advised_to_those_who_may_lack_it() -> None:
    layer = DEQFusion(16, 2, solver=Picard(max_iter=1))
    text = message_of(lambda: layer([torch.randn(4, 16)] * 2))
    assert "init='contractive' where it is 'torch'" in text


def test_rescue_is_not_advised_twice() -> None:
    solver = Anderson(rescue=True, max_iter=3)
    deq = DEQ(lambda z: (z < 0.5).to(z), solver=solver)  # it jumps, and has no fixed point
    assert "rescue=True" not in message_of(lambda: deq(torch.ones(2, 3)))


def test_a_tolerance_below_rounding_is_named() -> None:
    torch.manual_seed(0)
    fusion = DEQFusion(64, 2, solver=Anderson(tol=1e-9))
    assert "near float32 rounding" in message_of(lambda: fusion([torch.randn(8, 64)] * 2))


def test_the_warning_points_at_the_users_line() -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        DEQ(lambda z: 1 + z, solver=Picard(max_iter=3))(torch.ones(2, 3))
    assert caught[0].filename == __file__
