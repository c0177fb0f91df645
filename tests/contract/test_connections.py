"""The connections of a client, as the system sees them."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from loops_async import ServiceClient
from loops_local import LocalService
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.work import FEW_TOKENS, PROMPT, eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of connections")

MANY_SAMPLES = """
import asyncio, resource, sys

resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))

import loops_async as loops

async def main():
    async with loops.ServiceClient(base_url=sys.argv[1], api_key=sys.argv[2], on_exit="leave") as service:
        sampler = await service.create_sampling_client(sys.argv[3])
        await asyncio.gather(*(sampler.sample([1, 2], 1, loops.SamplingParams(max_tokens=1)) for _ in range(300)))

asyncio.run(main())
"""


def timers(port: int) -> list[str]:
    """Return the kind of timer of each open connection to `port`; ``02`` is the probing of silent ones."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [
        timer.partition(":")[0] for _, _, to, state, _, timer, *_ in rows if (to[-4:], state) == (f"{port:04X}", "01")
    ]


async def test_a_silent_connection_is_probed(colour: Colour, local: LocalService, engine: WatchedEngine) -> None:
    engine.hold_samples()
    port = int(local.base_url.rpartition(":")[2])
    async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
        sampler = await service.create_sampling_client(engine.name)
        sample = asyncio.ensure_future(sampler.sample(PROMPT, 1, FEW_TOKENS))
        await eventually(lambda: engine.waiting_samples == 1)
        await eventually(lambda: set(timers(port)) == {"02"})
        engine.release_samples()
        await sample


async def test_more_samples_than_files_that_may_be_open(service: ServiceClient, local: LocalService) -> None:
    sampler = await service.create_sampling_client("watched")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", MANY_SAMPLES, local.base_url, local.api_key, sampler.get_base_model()),
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    assert (process.returncode, errors.decode()) == (0, ""), "none fails, and none has to be tried again"
