"""``torch.export`` and AOTInductor: an inference model as a file that runs without its Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import every_device  # noqa: F401 - autouse
from torch import Tensor, nn

from deqfuse import DEQFusion

DIM, N = 16, 3
in_ci = os.environ.get("CI", "").lower() == "true"


class Classifier(nn.Module):
    """Projections, fusion, head; and which rows to trust."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fusion = DEQFusion(DIM, N, in_dims=[5] * N, dropout=0.1, **options)
        self.head = nn.Linear(DIM, 4)
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        z, info = self.fusion([a, b, c], return_info=True)
        return self.head(z), info.converged


def draw(rows: int) -> tuple[Tensor, ...]:
    torch.manual_seed(rows)
    return tuple(torch.randn(rows, 5) for _ in range(N))


def exported(model: nn.Module, *, strict: bool = False) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows", min=1, max=1024)
    shapes = tuple({0: rows} for _ in range(N))
    return torch.export.export(model, draw(4), dynamic_shapes=shapes, strict=strict)


def operators(program: torch.export.ExportedProgram) -> list[str]:
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [target for target in targets if target.startswith("deqfuse")]


# torch 2.11 warns of its own way to read what it saved.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize(
    ("backend", "strict"),
    [
        ("auto", False),
        pytest.param("auto", True, marks=pytest.mark.slow),
        pytest.param("reference", False, marks=pytest.mark.slow),
    ],
)
def test_an_exported_model_is_one_operator_and_right_at_any_size(backend, strict, tmp_path):
    model = Classifier(backend=backend)
    program = exported(model, strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    for found in (program, loaded, program.run_decompositions()):
        assert operators(found) == ["deqfuse.solve_layer.default"]
        for rows in (1, 4, 9):
            given, expected = found.module()(*draw(rows)), model(*draw(rows))
            torch.testing.assert_close(given, expected)
            assert given[1].all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cell": "identity"}, ["deqfuse.solve_fuse.default"]),
        ({"combine": "sum"}, ["deqfuse.solve_cells.default"]),
        ({"weight_tied_steps": 2}, []),
    ],
    ids=str,
)
def test_ablations(options, expected):
    torch.manual_seed(0)
    layer, xs = DEQFusion(DIM, N, **options).eval(), [torch.randn(4, DIM) for _ in range(N)]
    program = torch.export.export(layer, (xs,))
    assert operators(program) == expected
    torch.testing.assert_close(program.module()(xs), layer(xs))


RUN = """
import sys, torch
import deqfuse  # registers the operators
model = torch._inductor.aoti_load_package(sys.argv[1])
for inputs, expected in torch.load(sys.argv[2]):
    for given, wanted in zip(model(*inputs), expected, strict=True):
        torch.testing.assert_close(given, wanted)
print("agreed")
"""


@pytest.mark.ci
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None and not in_ci,
    reason="AOTInductor needs a C++ compiler",
)
def test_a_package_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    model = Classifier()
    package, samples = tmp_path / "model.pt2", tmp_path / "samples.pt"
    torch._inductor.aoti_compile_and_package(exported(model), package_path=str(package))
    torch.save([(draw(rows), model(*draw(rows))) for rows in (1, 4, 9)], samples)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, str(package), str(samples)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "agreed", done.stderr
