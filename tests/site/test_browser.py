"""The built site in Debian's Chromium: light, dark, and as narrow as a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.site.test_files import pages
from tests.support.browser import PHONE, brightness_of, width_of

Open = Callable[..., Any]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a line for each request."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Open]:
    """A function that opens a page of the site, with options of the browser's context."""
    contexts = []

    def opened(path: str, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}/{path}")
        return page

    asked: list[str] = []
    yield opened
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith((address, "data:"))] == []


def test_no_page_scrolls_sideways_on_a_phone(opened: Open, site: Path) -> None:
    page = opened("index.html", viewport=PHONE)
    too_wide = []
    for each in pages(site):
        page.goto(
            page.url.split("/", 3)[0] + "//" + page.url.split("/", 3)[2] + f"/{each.relative_to(site).as_posix()}"
        )
        if width_of(page) > PHONE["width"]:
            too_wide.append(each.name)
    assert too_wide == []


def test_it_is_light_or_dark_as_the_system_is(opened: Open) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        brightness[scheme] = brightness_of(opened("index.html", color_scheme=scheme))
    assert brightness["light"] > 600
    assert brightness["dark"] < 200


def test_all_tabs_of_a_page_are_in_step(opened: Open) -> None:
    page = opened("async-rl.html")
    page.locator("label.sd-tab-label", has_text="blocking").first.click()
    shown = page.locator("label[data-sync-id='blocking']").evaluate_all(
        "labels => labels.map(label => document.getElementById(label.htmlFor).checked)"
    )
    assert len(shown) > 3
    assert all(shown)


@pytest.mark.parametrize("name", ["loops_sync.ServiceClient.close", "loops_async.ServiceClient.close"])
def test_a_link_to_a_member_opens_its_tab(opened: Open, name: str) -> None:
    page = opened("reference/clients.html")
    assert page.locator(f"[id='{name}']").is_visible() == name.startswith("loops_async")
    page.evaluate("name => { location.hash = name }", name)
    page.locator(f"[id='{name}']").wait_for(state="visible")


def test_the_search_finds_a_method(opened: Open) -> None:
    page = opened("search.html?q=forward_backward")
    page.locator("#search-results li a").first.wait_for()
