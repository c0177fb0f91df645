"""Adapters in memory, by the id of their checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final
from weakref import WeakValueDictionary

from loops_async._tasks import SingleFlight, TaskOwner

from ..engine.base import Adapter

__all__ = ["MAX_KEPT_BYTES", "AdapterCache"]

MAX_KEPT_BYTES: Final = 512 * 1024**2
"""The memory of the adapters that no run serves and no request uses, kept for the next request."""


class AdapterCache:
    """Finds every adapter that is in memory, and reads the others.

    Those that a run serves or a request uses are kept alive by these alone. Of those that requests named, the most
    recently used stay, up to `MAX_KEPT_BYTES`.
    """

    def __init__(self, owner: TaskOwner) -> None:
        self._alive: WeakValueDictionary[str, Adapter] = WeakValueDictionary()
        self._kept: OrderedDict[str, Adapter] = OrderedDict()
        self._kept_bytes = 0
        self._reads: SingleFlight[str, Adapter] = SingleFlight(owner)

    @property
    def nbytes(self) -> int:
        """The memory of all adapters that can be found here."""
        return sum({id(adapter): adapter.nbytes for adapter in list(self._alive.values())}.values())

    def share(self, checkpoint_id: str, adapter: Adapter) -> None:
        """Let requests find an adapter for as long as it is used elsewhere."""
        self._alive[checkpoint_id] = adapter

    async def get(self, checkpoint_id: str, read: Callable[[], Coroutine[Any, Any, Adapter]]) -> Adapter:
        """Return an adapter that is in memory, or read it once for all callers."""
        if (adapter := self._alive.get(checkpoint_id)) is not None:
            return adapter
        return await self._reads.get(checkpoint_id, partial(self._read, checkpoint_id, read))

    async def _read(self, checkpoint_id: str, read: Callable[[], Coroutine[Any, Any, Adapter]]) -> Adapter:
        try:
            adapter = self._alive[checkpoint_id] = await read()
            return adapter
        finally:
            self._reads.discard(checkpoint_id)

    def keep(self, checkpoint_id: str, adapter: Adapter) -> None:
        """Keep an adapter in memory as the most recently used one."""
        self.release(checkpoint_id)
        self._kept[checkpoint_id] = adapter
        self._kept_bytes += adapter.nbytes
        while self._kept_bytes > MAX_KEPT_BYTES:
            self.release(next(iter(self._kept)))

    def release(self, checkpoint_id: str) -> None:
        """Keep an adapter no longer; requests that use it are not affected."""
        adapter = self._kept.pop(checkpoint_id, None)
        if adapter is not None:
            self._kept_bytes -= adapter.nbytes
