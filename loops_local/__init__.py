"""The whole Loops service on one machine: control plane, LoRA trainer, sampler and checkpoint store.

Example:
    >>> import asyncio, loops_local
    >>> async def main():
    ...     async with loops_local.LocalService(engine="echo") as local:
    ...         return repr(local).startswith("<LocalService at http://127.0.0.1:")
    >>> asyncio.run(main())
    True
"""

from ._service import DEFAULT_MODELS, LocalService, serve_in_thread
from ._storage.store import StoreLockedError
from .engine import Engine, EngineFactory, RefusedError
from .faults import FaultProxy, proxy_in_thread

__all__ = [
    "DEFAULT_MODELS",
    "Engine",
    "EngineFactory",
    "FaultProxy",
    "LocalService",
    "RefusedError",
    "StoreLockedError",
    "proxy_in_thread",
    "serve_in_thread",
]
