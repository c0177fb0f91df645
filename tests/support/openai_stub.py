"""As much of the `openai` package as examples in pages use; the real one has tests of its own in `tests/judges`."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import aiohttp
import msgspec


class AsyncOpenAI:
    def __init__(self, *, base_url: str, api_key: str) -> None:
        self._url = f"{base_url}/chat/completions"
        self._headers = {"authorization": f"Bearer {api_key}"}
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._create))

    def with_options(self, *, base_url: str, api_key: str) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=base_url, api_key=api_key)

    async def __aenter__(self) -> AsyncOpenAI:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing is open between calls."""

    async def _create(self, *, messages: list[Any], **body: Any) -> Any:
        sent = [msgspec.to_builtins(each, enc_hook=vars) for each in messages]
        async with (
            aiohttp.ClientSession(headers=self._headers) as session,
            session.post(self._url, json={**body, "messages": sent}) as answer,
        ):
            assert answer.status == 200, await answer.text()
            return _attributes(await answer.json())


class Fields(SimpleNamespace):
    """What an answer does not have is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _attributes(value: Any) -> Any:
    if isinstance(value, dict):
        return Fields(**{name: _attributes(each) for name, each in value.items()})
    return [_attributes(each) for each in value] if isinstance(value, list) else value


def module() -> ModuleType:
    made = ModuleType("openai")
    vars(made)["AsyncOpenAI"] = AsyncOpenAI
    return made
