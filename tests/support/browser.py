"""Debian's Chromium, driven by Playwright. Where one of them is missing, tests say NOT TESTED and are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE = {"width": 390, "height": 844}


@contextmanager
def started() -> Generator[Any]:
    """Start a browser, for all tests of a session."""
    playwright = pytest.importorskip("playwright.sync_api", reason="NOT TESTED: pages in a browser need playwright")
    path = shutil.which("chromium") or pytest.skip("NOT TESTED: pages in a browser need chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def width_of(page: Any) -> int:
    """Return the width in pixels that a page takes, also beside what is shown."""
    width: int = page.evaluate("document.scrollingElement.scrollWidth")
    return width


def brightness_of(page: Any) -> int:
    """Return that of a page's ground, from 0 to 765."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, colour.strip("rgb()").split(",")[:3]))
