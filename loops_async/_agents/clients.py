"""Ready clients for one rollout, of the packages `openai` and `anthropic`.

This imports nothing of the library, so that `tests/judges` runs it beside the real packages.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from ssl import PROTOCOL_TLS_CLIENT, SSLContext
from typing import Any, Final, Literal, TypeAlias

__all__ = ["Clients", "Package"]

Package: TypeAlias = Literal["openai", "anthropic"]

NAMES: Final = {"openai": "OpenAI", "anthropic": "Anthropic"}

Loop: TypeAlias = asyncio.AbstractEventLoop | None


class Clients:
    """The clients that have been asked for: of each package, one for each event loop, and one for code that blocks."""

    def __init__(self, urls: dict[Package, str], key: str) -> None:
        self._urls = urls
        self._key = key
        self._made: dict[tuple[Package, Loop], Any] = {}

    def get(self, package: Package) -> Any:
        """Return the client of a package for code that runs where this is called.

        Raises:
            ImportError: the package is not installed.
        """
        loop = _running_loop()
        known = self._made.get((package, loop))
        if known is not None:
            return known
        # Threads of one rollout may call this at once; all get the same, and one without connections needs no closing.
        return self._made.setdefault((package, loop), _new_client(package, self._urls[package], self._key, loop))

    async def close(self) -> None:
        """Close those for code that blocks, and those of this event loop."""
        made, self._made = self._made, {}
        for (_, loop), client in made.items():
            if loop is None:
                client.close()
            elif loop is _running_loop():
                await client.close()


def _running_loop() -> Loop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _new_client(package: Package, url: str, key: str, loop: Loop) -> Any:
    try:
        library: Any = import_module(package)
    except ImportError as missing:
        raise ImportError(f"{package}_client needs the package {package}: pip install {package}") from missing
    form = "Async" if loop is not None else ""
    connections = getattr(library, f"Default{form}HttpxClient")
    # To load certificates takes 80 ms, and there is nothing to trust: the address is on this machine, behind no proxy.
    http_client = connections(verify=SSLContext(PROTOCOL_TLS_CLIENT), trust_env=False)
    return getattr(library, f"{form}{NAMES[package]}")(base_url=url, api_key=key, http_client=http_client)
