"""The figures of this process in the text format of Prometheus.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal

from aiohttp import web
from msgspec import Struct

from .._http.openapi import FILE, described
from .._http.paths import METRICS
from .._resources.metrics import resident_bytes
from .._resources.registry import Registry
from ..engine.base import SamplerUsage

__all__ = ["FigureRoutes"]

_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class _Figure(Struct, frozen=True):
    name: str
    kind: Literal["gauge", "counter"]
    meaning: str


_ADAPTERS: Final = _Figure(
    "loops_adapter_bytes", "gauge", "LoRA weights that runs serve, requests use, or that are kept for later requests."
)
_MEMORY: Final = _Figure("process_resident_memory_bytes", "gauge", "Memory of this process.")
_CPU: Final = _Figure("process_cpu_seconds_total", "counter", "CPU time of this process.")
_OF_SAMPLERS: Final[Mapping[str, _Figure]] = {
    "running": _Figure("loops_samples_running", "gauge", "Completions that are generated now."),
    "waiting": _Figure("loops_samples_waiting", "gauge", "Completions that wait for a place."),
    "cache_bytes": _Figure("loops_kv_cache_bytes", "gauge", "KV cache of the completions under way."),
    "prefix_bytes": _Figure("loops_prefix_cache_bytes", "gauge", "Prompts that are kept for later requests."),
    "prefilled": _Figure("loops_prompt_tokens_computed_total", "counter", "Positions of prompts that were computed."),
    "reused": _Figure("loops_prompt_tokens_reused_total", "counter", "Positions of prompts that were not computed."),
    "put_back": _Figure("loops_samples_put_back_total", "counter", "Completions interrupted because memory was full."),
}
"""By the fields of `SamplerUsage`."""


class FigureRoutes:
    """The handler of this route."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        return [web.get(METRICS, self.figures)]

    @described("Get the figures of this process, for Prometheus", FILE)
    async def figures(self, _request: web.Request) -> web.Response:
        usages = {host.name: host.usage for host in self._registry.models.hosts}
        memory = resident_bytes()
        lines = [
            *_lines(_ADAPTERS, {"": self._registry.checkpoints.adapter_bytes}),
            *(line for field, figure in _OF_SAMPLERS.items() for line in _lines(figure, _by_model(usages, field))),
            *_lines(_CPU, {"": time.process_time()}),
            *([] if memory is None else _lines(_MEMORY, {"": memory})),
        ]
        return web.Response(body="\n".join([*lines, ""]).encode(), headers={"Content-Type": _CONTENT_TYPE})


def _by_model(usages: Mapping[str, SamplerUsage], field: str) -> dict[str, float]:
    return {f'{{model="{_escaped(name)}"}}': getattr(usage, field) for name, usage in usages.items()}


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace('"', '\\"')


def _lines(figure: _Figure, values: Mapping[str, float]) -> Iterator[str]:
    yield f"# HELP {figure.name} {figure.meaning}"
    yield f"# TYPE {figure.name} {figure.kind}"
    for labels, value in values.items():
        yield f"{figure.name}{labels} {value}"
