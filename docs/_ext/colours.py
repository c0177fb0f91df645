"""The directive `{colours}`: code that is written once, in two tabs. CONTRIBUTING.md describes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from tools.blocking_docs import GenerationError, both_forms

if TYPE_CHECKING:
    from sphinx.application import Sphinx

COLOURS: Final = ("async", "blocking")


def tabs(contents: Iterable[str]) -> str:
    """Return Markdown with a tab for each colour; all tabs of a page are in step."""
    items = (
        f":::::{{tab-item}} {colour}\n:sync: {colour}\n\n{content}\n:::::\n"
        for colour, content in zip(COLOURS, contents, strict=True)
    )
    return "::::::{tab-set}\n:sync-group: colour\n\n" + "\n".join(items) + "::::::\n"


class Colours(SphinxDirective):
    has_content = True
    option_spec = {"hidden": directives.flag}  # noqa: RUF012 - the interface of docutils

    def run(self) -> list[nodes.Node]:
        if "hidden" in self.options:
            return []
        try:
            forms = both_forms("\n".join(self.content) + "\n", "loops_async")
        except GenerationError as problem:
            raise self.error(f"{problem}; write the blocking form behind a line %%") from None
        source, line = self.get_source_info()
        text = tabs(f"```python\n{form}```" for form in forms).splitlines()
        container = nodes.Element()
        self.state.nested_parse(StringList(text, items=[(source, line)] * len(text)), self.content_offset, container)
        return container.children


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("colours", Colours)
    return {"parallel_read_safe": True}
