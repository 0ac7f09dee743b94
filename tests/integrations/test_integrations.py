"""The examples that put the layer under other libraries: each trains on the numerals, and learns.

``pip install 'deqfuse[integrations]'`` brings what they need; where a package is missing, its test
is skipped and says so. ``make test-integrations`` installs them.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from deqfuse import Anderson, DEQFusion

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = 80  # an example of an integration is shorter
NUMERALS = 0.9  # accuracy that ten epochs exceed by far; chance is 0.1
# What other packages deprecate in each other is theirs.
pytestmark = pytest.mark.filterwarnings("default", "error::deqfuse.ConvergenceWarning")


def example(monkeypatch: pytest.MonkeyPatch, name: str, *packages: str) -> ModuleType:
    """The example as a module, where what it imports is installed."""
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package}: make test-integrations")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def test_lightning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logged = example(monkeypatch, "lightning_module", "lightning").main(10, tmp_path)
    assert logged["accuracy"] > NUMERALS
    assert logged["converged"] == 1.0


def test_hugging_face_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = example(monkeypatch, "huggingface_trainer", "transformers", "accelerate")
    assert module.main(10, tmp_path)["eval_accuracy"] > NUMERALS


def test_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy, converged = example(monkeypatch, "accelerate_loop", "accelerate").main(10)
    assert accuracy > NUMERALS
    assert converged == 1.0


def test_scikit_learn_by_skorch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = example(monkeypatch, "sklearn_estimator", "skorch")
    assert module.main(10) > NUMERALS


def test_the_estimators_loss_has_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    module = example(monkeypatch, "sklearn_estimator", "skorch")
    estimator = module.FusionClassifier(
        module.Classifier, module__widths=(3,), module__num_classes=3,
        criterion=torch.nn.CrossEntropyLoss,
    ).initialize()  # fmt: skip
    scores, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    plain, more = (
        estimator.get_loss((scores, torch.tensor(penalty)), labels) for penalty in (0.0, 1.0)
    )
    assert more - plain == pytest.approx(module.PENALTY)


def test_onnx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = example(monkeypatch, "onnx_export", "onnxscript", "onnxruntime")
    import onnxruntime

    torch.manual_seed(0)
    fusion = DEQFusion(module.DIM, 2, in_dims=module.WIDTHS, solver=Anderson(tol=1e-6))
    samples = [torch.randn(8, width) for width in module.WIDTHS]
    error = module.export(fusion, samples, tmp_path / "fusion.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "fusion.onnx")
    views = [torch.randn(5, width) for width in module.WIDTHS]  # another number of rows
    feed = {i.name: v.numpy() for i, v in zip(session.get_inputs(), views, strict=True)}
    (found,) = session.run(None, feed)
    want = fusion(views).detach()
    # Both are within their own tolerance of the equilibrium; 1e-6 is the solver's.
    torch.testing.assert_close(torch.from_numpy(found), want, rtol=0, atol=1e-4)
    assert error < 1e-4


def test_onnx_refuses_what_does_not_settle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = example(monkeypatch, "onnx_export", "onnxscript")
    torch.manual_seed(0)
    wild = DEQFusion(module.DIM, 2, in_dims=module.WIDTHS, init="torch", on_failure="ignore")
    with pytest.raises(ValueError, match="16 steps are off by"):
        module.export(wild, [torch.randn(64, width) for width in module.WIDTHS], tmp_path / "x")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{}", "views: 'views'"),
        ("nonsense", "views: Expecting value"),
        ('{"views": [[[1.0, 2.0]]]}', "expected views of shape (rows, (20, 12))"),
    ],
)
def test_a_service_refuses_wrong_requests(
    monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    module = example(monkeypatch, "serve_http")
    status, content = module.answer(module.Classifier(), body.encode())
    assert status == 400
    assert said in content["error"]


def test_a_service_answers_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model itself in place of its package, which takes half a minute to compile."""
    module = example(monkeypatch, "serve_http")
    torch.manual_seed(0)
    model = module.Classifier().eval().requires_grad_(False)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: model)
    views = [torch.randn(3, width) for width in module.WIDTHS]
    with served(module, "model.pt2") as url:
        found = post(url, {"views": [view.tolist() for view in views]})
    assert found["converged"] == [True] * 3
    torch.testing.assert_close(torch.tensor(found["scores"]), model(*views)[0])


@pytest.mark.ci
def test_a_package_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = example(monkeypatch, "serve_http")
    torch.manual_seed(0)
    path = str(tmp_path / "model.pt2")
    module.export(path)
    torch.manual_seed(0)
    views = [torch.randn(3, width) for width in module.WIDTHS]
    with served(module, path) as url:
        found = post(url, {"views": [view.tolist() for view in views]})
    torch.manual_seed(0)
    want = module.Classifier().eval()(*views)[0]
    torch.testing.assert_close(torch.tensor(found["scores"]), want)


class served:
    """The service on a free port, as a context manager that gives its address."""

    def __init__(self, module: ModuleType, path: str) -> None:
        self.server = module.server(path, port=0)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_port}/"

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def post(url: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(content).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        found: dict[str, Any] = json.load(response)
    return found


def integrations() -> Iterator[Path]:
    """Every example but those that are larger for a reason."""
    yield from (
        p for p in EXAMPLES.glob("*.py") if p.stem not in ("multibench", "train_distributed")
    )


def test_examples_are_short() -> None:
    found = {path.name: len(path.read_text().splitlines()) for path in integrations()}
    assert len(found) == 10
    assert not {name: lines for name, lines in found.items() if lines >= LINES}
