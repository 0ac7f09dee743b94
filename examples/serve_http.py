"""A small HTTP service of an exported model, with nothing but the standard library around it.

    python examples/serve_http.py export model.pt2    # compiles: half a minute
    python examples/serve_http.py serve model.pt2     # POST {"views": [[[...], ...], [[...], ...]]}

The package holds the compiled model, the solve included; ``import deqfuse`` brings its operators.
An answer says for every row whether its equilibrium was found, so that a caller can tell a guess
from an answer. The server is Python's own: put a real one in front where strangers can reach it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
from torch import Tensor, nn

from deqfuse import DEQFusion

WIDTHS, DIM, CLASSES = (20, 12), 64, 3


class Classifier(nn.Module):
    """An argument per view, so that each has a dynamic number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion = DEQFusion(DIM, len(WIDTHS), in_dims=WIDTHS)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        fused, info = self.fusion([first, second], return_info=True)
        return self.head(fused).softmax(-1), info.converged


def export(path: str) -> None:
    """Compile a model (here an untrained one: load your weights first) into a package."""
    model = Classifier().eval().requires_grad_(False)
    samples = tuple(torch.randn(8, width) for width in WIDTHS)
    rows = torch.export.Dim("rows", min=1, max=4096)
    program = torch.export.export(model, samples, dynamic_shapes=({0: rows}, {0: rows}))
    torch._inductor.aoti_compile_and_package(program, package_path=path)


def answer(model: Callable[..., Any], text: bytes) -> tuple[int, dict[str, Any]]:
    """Status and content of the answer to a request's body."""
    try:
        views = [torch.tensor(view, dtype=torch.float32) for view in json.loads(text)["views"]]
        shapes = [tuple(view.shape) for view in views]
        if shapes != [(shapes[0][0], width) for width in WIDTHS]:
            raise ValueError(f"expected views of shape (rows, {WIDTHS}), got {shapes}")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        return 400, {"error": f"views: {error}"}
    scores, converged = model(*views)
    return 200, {"scores": scores.tolist(), "converged": converged.tolist()}


def server(path: str, port: int = 8000) -> HTTPServer:
    model = torch._inductor.aoti_load_package(path)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, content = answer(model, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    return HTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    export(sys.argv[2]) if sys.argv[1] == "export" else server(sys.argv[2]).serve_forever()
