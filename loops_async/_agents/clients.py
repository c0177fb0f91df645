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
Loop: TypeAlias = asyncio.AbstractEventLoop | None

NAMES: Final = {"openai": "OpenAI", "anthropic": "Anthropic"}


class Clients:
    """The clients that have been asked for: of each package, one for code that blocks, and one for coroutines."""

    def __init__(self, urls: dict[Package, str], key: str) -> None:
        self._urls = urls
        self._key = key
        self._blocking: dict[Package, Any] = {}
        self._async: dict[Package, tuple[Any, Loop]] = {}

    def get(self, package: Package, *, blocking: bool) -> Any:
        """Return the client of a package.

        Raises:
            ImportError: the package is not installed.
        """
        # Threads of one rollout may ask at once; all get the same, and one that was never used needs no closing.
        if blocking:
            return self._blocking.get(package) or self._blocking.setdefault(package, self._new(package, ""))
        known = self._async.get(package) or self._async.setdefault(
            package, (self._new(package, "Async"), _running_loop())
        )
        return known[0]

    async def close(self) -> None:
        """Close them, except what belongs to another event loop."""
        while self._blocking:
            self._blocking.popitem()[1].close()
        while self._async:
            client, loop = self._async.popitem()[1]
            if loop in (None, _running_loop()):
                await client.close()

    def _new(self, package: Package, form: str) -> Any:
        try:
            library: Any = import_module(package)
        except ImportError as missing:
            raise ImportError(f"{package}_client needs the package {package}: pip install {package}") from missing
        # To load certificates takes 80 ms; here is nothing to trust: the address is on this machine, behind no proxy.
        connections = getattr(library, f"Default{form}HttpxClient")
        http_client = connections(verify=SSLContext(PROTOCOL_TLS_CLIENT), trust_env=False)
        client = getattr(library, f"{form}{NAMES[package]}")
        return client(base_url=self._urls[package], api_key=self._key, http_client=http_client)


def _running_loop() -> Loop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
