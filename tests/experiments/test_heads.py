"""The examples of the layer inside a detector's head and a head for questions about pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_detector_learns_from_both(capsys: pytest.CaptureFixture[str]) -> None:
    """Either kind of features alone tells half of the class: 50% at most."""
    accuracy, error = load("detector_head").main(steps=40)
    assert accuracy > 0.7
    assert error < 0.6  # boxes that are not moved are off by 0.8
    assert "proposals (128, 8), 100% converged" in capsys.readouterr().out


def test_proposals_do_not_see_each_other() -> None:
    module = load("detector_head")
    torch.manual_seed(0)
    head, (views, _, _) = module.Head().double().eval(), module.data()
    views = [view.double() for view in views]
    with torch.no_grad():
        scores, shifts, info = head(*views)
        few, moved, _ = head(*(view[5:6, 2:4] for view in views))
    assert scores.shape == (128, 8, 4)
    assert info.converged.shape[:2] == (128, 8)
    # Every row is solved by the same steps, however many there are: equal but for rounding.
    torch.testing.assert_close(few, scores[5:6, 2:4])
    torch.testing.assert_close(moved, shifts[5:6, 2:4])


def test_questions_about_pictures_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    """The question alone allows 25%, the picture alone 50%."""
    assert load("vqa_head").main(steps=40) > 0.8
    assert "100% of the rows converged" in capsys.readouterr().out
