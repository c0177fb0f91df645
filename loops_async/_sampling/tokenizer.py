"""The tokenizer of a base model, from the service if it offers one, else from the Hugging Face hub."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread
from msgspec import Struct

from .._http.endpoint import Endpoint
from .._session.runtime import Runtime
from .._session.served_models import fetch_served_models
from ..errors import NotFoundError, ProtocolError
from ..protocol import segment


class _Files(Struct):
    files: list[str]


async def load_tokenizer(runtime: Runtime, sampler: Endpoint) -> Any:
    """Return the Hugging Face tokenizer of the sampler's base model, loaded once for each runtime.

    The embedded service serves the tokenizers of its models at the sampler, and lists them in ``/v1/models``.
    """
    if find_spec("transformers") is None:
        raise ImportError("get_tokenizer needs transformers: pip install 'loops-async[local]'")
    return await runtime.tokenizers.get(sampler.base_model, lambda: _load(runtime, sampler))


async def _load(runtime: Runtime, sampler: Endpoint) -> Any:
    route = await _route(runtime, sampler)
    if route is None:
        return await to_thread.run_sync(_from_pretrained, sampler.base_model)
    return await _fetch(runtime, sampler, route)


async def _route(runtime: Runtime, sampler: Endpoint) -> str | None:
    """Return where the sampler serves the tokenizer; a serverless sampler may not even list its models."""
    try:
        served = await fetch_served_models(sampler, runtime.transport)
    except (NotFoundError, ProtocolError):
        return None
    routes = {model.id: model.tokenizer for model in served.data if model.parent is None and model.tokenizer}
    route = routes.get(sampler.base_model) or next(iter(routes.values()), None)
    return f"/{route}" if route else None


async def _fetch(runtime: Runtime, sampler: Endpoint, route: str) -> Any:
    request = sampler.request("GET", route, "list the tokenizer's files", timeout=60.0)
    listing = await runtime.transport.fetch(request, _Files)
    async with anyio.TemporaryDirectory(prefix="loops-tokenizer-") as directory:
        for name in listing.files:
            if not name.isprintable() or set(name) & set("/\\:") or name in ("", ".", ".."):
                raise ProtocolError(f"the service lists a tokenizer file with an unsafe name: {name!r}")
            request = sampler.request("GET", f"{route}/{segment(name)}", f"fetch {name}", timeout=60.0)
            answer = await runtime.transport.ask(request)
            await anyio.Path(directory, name).write_bytes(answer.body)
        try:
            return await to_thread.run_sync(_from_pretrained, directory)
        except ImportError:  # it says what to install
            raise
        except Exception as problem:  # of files that are no tokenizer, transformers raises anything
            raise ProtocolError(
                f"the sampler at {sampler.url} serves a tokenizer that cannot be read: {problem!r:.300}"
            ) from problem


def _from_pretrained(name: str | Path) -> Any:
    transformers: Any = import_module("transformers")  # optional: the type checkers may not find it
    return transformers.AutoTokenizer.from_pretrained(name)
