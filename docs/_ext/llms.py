"""Writes `llms.txt`: every page in one line, with its title and its first sentence."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from docutils import nodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def first_sentence(page: nodes.document) -> str:
    """Return the first sentence of a page, or nothing."""
    for paragraph in page.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        return re.split(r"(?<=[.?!]) ", text)[0]
    return ""


def write(app: Sphinx, error: Exception | None) -> None:
    if error is not None:
        return
    lines = [f"# {app.config.project} {app.config.release}", ""]
    for name in sorted(app.env.found_docs):
        title = app.env.titles[name].astext()
        lines.append(f"- [{title}]({name}.html): {first_sentence(app.env.get_doctree(name))}")
    (app.outdir / "llms.txt").write_text("\n".join(lines) + "\n", "utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("build-finished", write)
    return {"parallel_read_safe": True}
