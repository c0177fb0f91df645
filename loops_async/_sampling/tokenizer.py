"""The tokenizer of a base model, from the service if it offers one, else from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread
from msgspec import Struct

from .._http.transport import Request
from .._session.runtime import Runtime
from ..errors import NotFoundError, ProtocolError
from ..protocol import ServedModels, segment


class _Files(Struct):
    files: list[str]


async def load_tokenizer(
    runtime: Runtime, *, root: str, headers: Mapping[str, str], authorize: bool, base_model: str
) -> Any:
    """Return the Hugging Face tokenizer of `base_model`, loaded once for each runtime.

    `root` is a sampler's: an embedded service serves its models' tokenizers there and says so in ``/v1/models``.
    """
    _require_transformers()
    key = ("tokenizer", base_model)
    if key not in runtime.shared:
        common: dict[str, Any] = {"headers": headers, "authorize": authorize}
        place = await _place(runtime, root, base_model, common)
        if place is None:
            runtime.shared[key] = await to_thread.run_sync(_load, base_model)
        else:
            runtime.shared[key] = await _fetch(runtime, f"{root}/{place}", common)
    return runtime.shared[key]


async def _place(runtime: Runtime, root: str, base_model: str, common: Mapping[str, Any]) -> str | None:
    """Return where below `root` the tokenizer is served; a serverless sampler may not even list its models."""
    what = f"find the tokenizer of {base_model}"
    try:
        served = await runtime.transport.get(f"{root}/v1/models", ServedModels, what=what, **common)
    except (NotFoundError, ProtocolError):
        return None
    places = {model.id: model.tokenizer for model in served.data if model.parent is None and model.tokenizer}
    return places.get(base_model) or next(iter(places.values()), None)


async def _fetch(runtime: Runtime, url: str, common: Mapping[str, Any]) -> Any:
    listing = await runtime.transport.get(url, _Files, what="list the tokenizer's files", **common)
    async with anyio.TemporaryDirectory(prefix="loops-tokenizer-") as directory:
        for name in listing.files:
            if not name.isprintable() or set(name) & set("/\\:") or name in ("", ".", ".."):
                raise ProtocolError(f"the service lists a tokenizer file with an unsafe name: {name!r}")
            request = Request(method="GET", url=f"{url}/{segment(name)}", what=f"fetch {name}", **common)
            answer = await runtime.transport.ask(request)
            await anyio.Path(directory, name).write_bytes(answer.body)
        return await to_thread.run_sync(_load, directory)


def _require_transformers() -> None:
    if find_spec("transformers") is None:
        raise ImportError("get_tokenizer needs transformers: pip install 'loops-async[local]'")


def _load(name: str | Path) -> Any:
    transformers: Any = import_module("transformers")  # an extra, of which the type checkers need know nothing
    return transformers.AutoTokenizer.from_pretrained(name)
