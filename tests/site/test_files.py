"""What the built site contains."""

from __future__ import annotations

import inspect
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
from sphinx.util.inventory import InventoryFile

import loops_async
import loops_local
import loops_sync
import loops_tinker
from tests.site.conftest import ROOT

SHOWN_FIRST = {loops_sync: loops_async, loops_tinker.types: loops_tinker}
"""Where the names of a package stand that another one has, too."""

CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "OperationFuture", "ControlPlane")


class Elements(HTMLParser):
    """The tags of a page, what they load, where they lead, and where links may lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}
        self.loaded += [value or "" for name, value in attributes if name == names.get(tag)]
        self.links += [value or "" for name, value in attributes if (tag, name) == ("a", "href")]
        self.ids |= {value or "" for name, value in attributes if name == "id"}


def pages(site: Path) -> list[Path]:
    """Return the pages that people write, without the index and the search."""
    return [page for page in sorted(site.rglob("*.html")) if page.name not in ("genindex.html", "search.html")]


def test_it_is_complete(site: Path) -> None:
    for name in ("index.html", "objects.inv", "search.html", "llms.txt"):
        assert (site / name).stat().st_size
    wanted = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "reference").glob("*.md")]
    assert {page.stem for page in pages(site)} == {page.stem for page in wanted}


@pytest.mark.parametrize(
    "package",
    [loops_async, loops_sync, loops_local, loops_tinker, loops_tinker.types],
    ids=lambda package: package.__name__,
)
def test_the_inventory_has_every_public_name(site: Path, package: ModuleType) -> None:
    assert not public_names(package) - inventory(site)


def inventory(site: Path) -> set[str]:
    entries = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    return {name for kind, names in entries.items() if kind.startswith("py:") for name in names}


def public_names(package: ModuleType) -> set[str]:
    """Return the paths of all exports, and of the members of clients."""
    paths = set()
    for name in package.__all__:
        value, shown_first = getattr(package, name), SHOWN_FIRST.get(package)
        if isinstance(value, ModuleType):
            continue
        path = f"{(shown_first if getattr(shown_first, name, None) is value else package).__name__}.{name}"
        paths.add(path)
        if name in CLIENTS and package is not loops_local:
            members = dir(value)
            paths |= {f"{path}.{member}" for member in members if not member.startswith("_")}
    return paths


def test_every_page_has_one_title_and_says_what_it_answers(site: Path) -> None:
    lines = (site / "llms.txt").read_text().splitlines()
    for page in pages(site):
        text = page.read_text()
        assert Elements(text).tags.count("h1") == 1, page.name
        place = page.relative_to(site).as_posix()
        (line,) = [line for line in lines if f"]({place}): " in line]
        assert re.search(r"\]\(\S+\): \S.+[.?:]$", line), line


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        foreign = [address for address in Elements(page.read_text()).loaded if re.match(r"(\w+:)?//", address)]
        assert not foreign, (page.name, foreign)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", sheet.read_text()), sheet.name


def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    """Also those to files outside `docs/`, e.g. of `examples/`, of which the site has copies."""
    elements = {path.resolve(): Elements(path.read_text()) for path in site.rglob("*.html")}
    dead = []
    for page, page_elements in elements.items():
        for link in page_elements.links:
            address = urlsplit(link)
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            there = elements.get(target)
            is_dead = not target.is_file() or (
                there and address.fragment and unquote(address.fragment) not in there.ids
            )
            if not address.scheme and not address.netloc and is_dead:
                dead.append((page.name, link))
    assert not dead


def test_no_file_names_this_machine(site: Path) -> None:
    for path in site.rglob("*"):
        if path.suffix in (".html", ".txt", ".js"):
            text = path.read_text()
            assert str(ROOT) not in text, path
            assert str(Path.home()) + "/" not in text, path


def shown(site: Path, page: str) -> str:
    return re.sub(r"<[^>]+>", "", (site / f"{page}.html").read_text())


def test_the_blocking_form_is_made_and_hidden_blocks_are_not_shown(site: Path) -> None:
    text = shown(site, "async-rl")
    assert "import loops_async as loops" in text
    assert "import loops_sync as loops" in text
    assert "removeHandler" in (ROOT / "docs" / "logging.md").read_text()
    assert "removeHandler" not in shown(site, "logging")


def test_members_of_clients_have_docstrings() -> None:
    """An entry without a word answers nothing."""
    for name in CLIENTS:
        members = inspect.getmembers(getattr(loops_async, name), inspect.isfunction)
        silent = [member for member, value in members if not member.startswith("_") and not inspect.getdoc(value)]
        assert not silent, (name, silent)
