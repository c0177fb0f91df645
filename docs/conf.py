"""The documentation site; `tools/build_docs.py` builds it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

# ruff: noqa: E402 - found in ROOT
from loops_async import __version__

project = "loops-async"
author = "the maintainers of loops-async"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "colours",
    "reference",
    "llms",
]
exclude_patterns = ["_build", "_ext"]
root_doc = "index"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_use_ivar = True
napoleon_use_rtype = False
toc_object_entries = False  # they would name each method twice, once for each colour
default_role = "name"  # what single backticks mean in docstrings: see `_ext/reference.py`

nitpicky = True
nitpick_ignore_regex = [(r"py:(?!name$).*", r"(?!loops_(async|sync|local|tinker)\b).*")]
"""Names outside our packages: looking them up would need a network."""

html_theme = "furo"
html_title = "loops-async"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
