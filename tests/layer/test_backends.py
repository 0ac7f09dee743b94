"""Which backend runs, and why another does not."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, get_args

import pytest
import torch

from deqfuse import (
    Anderson,
    BackendUnavailable,
    Broyden,
    DEQFusion,
    Implicit,
    Unrolled,
    backends,
)
from deqfuse.backends import BACKENDS, Backend, BackendStatus, Problem, choose, describe, load


def replace(monkeypatch: pytest.MonkeyPatch, name: str, **fields: Any) -> None:
    """A backend with other answers, for one test."""
    monkeypatch.setitem(BACKENDS, name, dataclasses.replace(load(name), **fields))


def problem(**changes: Any) -> Problem:
    fields = {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "dim": 8,
        "num_groups": 2,
        "solver": Anderson(),
        "adjoint": Implicit(),
    }
    return Problem(**{**fields, **changes})


def layer(**options: Any) -> DEQFusion:
    torch.manual_seed(0)
    return DEQFusion(8, 2, **{"num_groups": 2, **options})


XS = [torch.ones(3, 8), torch.linspace(-1, 1, 24).view(3, 8)]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEQFUSE_BACKEND", raising=False)


def unavailable() -> list[str]:
    return [status.name for status in describe() if not status.available]


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_answers_for_itself(name: str) -> None:
    backend = load(name)
    assert isinstance(backend, Backend)
    assert backend.summary
    missing = backend.unavailable()
    if missing is not None:
        reason, remedy = missing
        assert reason
        assert remedy


def test_the_type_names_every_backend() -> None:
    assert get_args(backends.BackendName) == ("auto", *BACKENDS)


def test_description_covers_every_backend_in_order() -> None:
    table = describe()
    assert [status.name for status in table] == list(BACKENDS)
    assert all(isinstance(status, BackendStatus) and status.reason for status in table)
    assert all(status.remedy for status in table if not status.available)
    assert table[-1] == BackendStatus("reference", True, table[-1].reason, "")


def test_the_reference_takes_everything() -> None:
    for device in ("cpu", "cuda", "meta"):
        assert choose("reference", problem(device=torch.device(device))) == "reference"


@pytest.mark.parametrize("name", unavailable())
def test_explicit_request_is_refused_with_reason_and_remedy(name: str) -> None:
    status = next(s for s in describe() if s.name == name)
    with pytest.raises(BackendUnavailable) as caught:
        layer(backend=name)(XS)
    message = str(caught.value)
    assert f"backend={name!r}" in message
    assert status.reason in message
    assert f"Remedy: {status.remedy}" in message


@pytest.mark.parametrize("name", unavailable())
@pytest.mark.parametrize(
    "options",
    [
        {"weight_tied_steps": 2},
        {"cell": "identity", "combine": "sum"},
        {"combine": "weighted_sum"},
        {"cell": "identity", "gate": False},
        {"adjoint": Unrolled()},
    ],
    ids=str,
)
def test_explicit_request_is_never_answered_by_another(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(BackendUnavailable, match=f"backend='{name}'"):
        layer(backend=name, **options)(XS)


def test_auto_takes_the_first_that_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def objection(name: str, problem: Problem) -> str | None:
        asked.append(name)
        return "not today" if name == first else None

    first, second, _ = BACKENDS
    monkeypatch.setattr(backends, "_objection", objection)
    assert choose("auto", problem()) == second
    assert asked == [first, second]


def test_a_refusal_of_the_problem_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = lambda problem: f"no dim={problem.dim}"  # noqa: E731
    replace(monkeypatch, "cpu", unavailable=lambda: None, refuses=refuses)
    with pytest.raises(BackendUnavailable, match="backend='cpu' cannot take this call: no dim=8"):
        choose("cpu", problem())
    assert choose("auto", problem()) != "cpu"


@pytest.mark.parametrize("name", ["gpu", "", "AUTO", "Reference"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of cuda, cpu, reference"):
        choose(name, problem())


# ---- environment --------------------------------------------------------------------------------


def test_environment_takes_the_place_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEQFUSE_BACKEND", "reference")
    assert choose("auto", problem()) == "reference"
    _, info = layer()(XS, return_info=True)
    assert info.backend == "reference"


@pytest.mark.parametrize("name", unavailable())
def test_environment_is_an_explicit_request(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEQFUSE_BACKEND", name)
    with pytest.raises(BackendUnavailable, match=name):
        layer()(XS)
    _, info = layer(backend="reference")(XS, return_info=True)  # an argument goes first
    assert info.backend == "reference"


def test_unknown_name_in_the_environment_is_blamed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEQFUSE_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"DEQFUSE_BACKEND.*'gpu'"):
        choose("auto", problem())


def test_empty_environment_variable_means_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEQFUSE_BACKEND", "")
    assert choose("auto", problem()) in BACKENDS


# ---- what the user sees -------------------------------------------------------------------------


def test_info_names_the_backend_that_ran() -> None:
    _, info = layer()(XS, return_info=True)
    assert info.backend in BACKENDS
    assert info.backend not in unavailable()


def test_the_choice_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_announced", set())
    with caplog.at_level(logging.INFO, logger="deqfuse"):
        for _ in range(3):
            layer()(XS)
    assert [r.message.count("backend=") for r in caplog.records] == [1]


def test_unrolled_runs_on_the_reference() -> None:
    _, info = layer(adjoint=Unrolled())(XS, return_info=True)
    assert info.backend == "reference"


@pytest.mark.parametrize(
    ("missing", "options", "warned"),
    [
        (("it was not compiled", "install a compiler"), {}, True),
        (("it was not compiled", "install a compiler"), {"backend": "reference"}, False),
        (("it was not compiled", "install a compiler"), {"solver": Broyden()}, False),
        (None, {"solver": Broyden()}, False),
    ],
    ids=["missing", "asked for", "no use for it", "there"],
)
def test_losing_the_fast_path_is_said_once(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    missing: tuple[str, str] | None,
    options: dict[str, Any],
    warned: bool,
) -> None:
    monkeypatch.setattr(backends, "_announced", set())
    replace(monkeypatch, "cpu", unavailable=lambda: missing)
    for _ in range(3):
        layer(**options)(XS)
        layer(solver=Broyden())(XS)
    loud = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(loud) == warned
    for message in loud:
        assert "several times slower" in message
        assert "it was not compiled. Remedy: install a compiler" in message
