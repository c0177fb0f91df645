"""A service in a process of its own, whose trainers never finish anything: it is there to be killed.

Keeps its state in the directory that it is given, and prints its URL and its key.
"""

from __future__ import annotations

import asyncio
import sys

from loops_local import LocalService
from tests.support.engines import WatchedEngine


def engine(name: str) -> WatchedEngine:
    gated = WatchedEngine(name)
    gated.training.clear()
    return gated


async def main() -> None:
    async with LocalService(engine=engine, provisioning_seconds=0.0, data_dir=sys.argv[1]) as local:
        print(local.base_url, local.api_key, flush=True)
        await asyncio.Event().wait()


asyncio.run(main())
