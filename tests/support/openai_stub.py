"""As much of the `openai` package as tests and examples in pages use; the real one is tested in `tests/judges`."""

from __future__ import annotations

import urllib.request
from types import ModuleType, SimpleNamespace
from typing import Any

import aiohttp
import msgspec


class Connections:
    """Stands for `DefaultHttpxClient` and `DefaultAsyncHttpxClient`."""

    def __init__(self, **options: Any) -> None:
        self.options = options


class _Client:
    def __init__(self, *, base_url: str, api_key: str, http_client: Connections | None = None) -> None:
        self.base_url = base_url
        self.api_key = api_key
        self.http_client = http_client
        self.is_closed = False
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._create))

    def _create(self, **body: Any) -> Any:
        raise NotImplementedError

    @property
    def _url(self) -> str:
        return f"{self.base_url}/chat/completions"

    @property
    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}", "content-type": "application/json"}


class AsyncOpenAI(_Client):
    async def close(self) -> None:
        self.is_closed = True

    async def __aenter__(self) -> AsyncOpenAI:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _create(self, **body: Any) -> Any:
        async with (
            aiohttp.ClientSession(headers=self._headers) as session,
            session.post(self._url, data=_sent(body)) as answer,
        ):
            assert answer.status == 200, await answer.text()
            return _attributes(await answer.json())


class OpenAI(_Client):
    def close(self) -> None:
        self.is_closed = True

    def _create(self, **body: Any) -> Any:
        request = urllib.request.Request(self._url, _sent(body), self._headers)
        with urllib.request.urlopen(request) as answer:
            return _attributes(msgspec.json.decode(answer.read()))


class Fields(SimpleNamespace):
    """What an answer does not have is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _sent(body: dict[str, Any]) -> bytes:
    return msgspec.json.encode(body, enc_hook=vars)


def _attributes(value: Any) -> Any:
    if isinstance(value, dict):
        return Fields(**{name: _attributes(each) for name, each in value.items()})
    return [_attributes(each) for each in value] if isinstance(value, list) else value


def module(name: str = "OpenAI") -> ModuleType:
    """Return the package with classes of this name."""
    made = ModuleType(name.lower())
    clients = {name: OpenAI, f"Async{name}": AsyncOpenAI}
    vars(made).update(clients, DefaultHttpxClient=Connections, DefaultAsyncHttpxClient=Connections)
    return made
