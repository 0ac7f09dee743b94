"""How Sphinx builds the pages: `make docs`, strictly and without a network."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS / "_ext")]
# The notebooks' own processes: they find the checkout, and take as many threads as a reader's.
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["COLUMNS"] = "80"  # help texts as on a terminal of this width, whoever builds

project = "deqfuse"
author = "the deqfuse authors"
copyright = "the deqfuse authors, Apache-2.0"
release = version = importlib.metadata.version("deqfuse")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "generated",
]
exclude_patterns = ["_ext", "experiments/*/trials.jsonl"]
html_theme = "furo"
html_title = f"deqfuse {release}"
html_copy_source = False

# Links into torch's own pages need its inventory, which is on the network. Without the variable
# there are no such links, and a build asks nobody for anything.
intersphinx_mapping = {}
if os.environ.get("DEQFUSE_DOCS_LINK_TORCH") == "1":
    intersphinx_mapping["torch"] = ("https://docs.pytorch.org/docs/stable", None)

source_suffix = {".md": "myst-nb"}
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 4  # page.md#heading, as code hosts have it
nb_execution_mode = "cache"  # a notebook runs again when it has changed
nb_execution_cache_path = str(ROOT / "build" / "docs-cache")
nb_execution_timeout = 600  # a cell; on a machine that is busy with other things, too
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
