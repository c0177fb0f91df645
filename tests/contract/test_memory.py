"""What a client asks of the C library's allocator."""

from __future__ import annotations

import asyncio
import platform
import sys

import pytest

from loops_local import LocalService

BLOCKS_THAT_COME_AND_GO = """
import asyncio, resource, sys

import loops_async as loops

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

async def main():
    async with loops.ServiceClient(base_url=sys.argv[1], api_key=sys.argv[2]):
        before = faults()
        for _ in range(100):
            [b"x" * 100_000 for _ in range(20)]
        print(faults() - before)

asyncio.run(main())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries keep freed memory in ways of their own"
)
async def test_the_memory_of_answers_is_kept_for_the_next_ones(local: LocalService) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, *("-c", BLOCKS_THAT_COME_AND_GO, local.base_url, local.api_key), stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    assert int(printed) < 2_000, "all blocks together are 490 pages, a hundred times; only the first are new"
