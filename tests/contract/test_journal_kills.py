"""A process with a journal that gets SIGKILL, again and again, at moments that are chosen."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from aiohttp import web

from loops_local import LocalService
from tests.chaos.journaled import GROUPS, MEMBERS, MODEL, Seen, prompt, rate
from tests.support.engines import Engines
from tests.support.patience import PATIENCE_SECONDS
from tests.support.warnings import WARNINGS

STEPS = 3
MOMENTS = (
    ("POST */runs", 1, True),  # the run is made, and the program does not know its id
    ("POST */optim_step", 1, False),  # recorded and not sent
    ("POST */forward_backward", 1, True),  # executed, and the program does not know that it was accepted
    ("GET */operations/*", 4, False),  # accepted, and the outcome is not known
)
"""When each start is killed: at the request of this number of a route, before or after it is executed."""


async def start(local: LocalService, journal: Path, moment: tuple[str, int, bool] | None) -> tuple[int, bytes]:
    """Start the program, kill it at a moment, and return how it ended and what it printed."""
    arguments = "rollouts", local.base_url, str(local.api_key), str(journal), str(STEPS)
    command = [sys.executable, *WARNINGS, "-m", "tests.chaos.journaled", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:  # noqa: ASYNC220 - it is waited for below
        if moment is not None:
            _plan_kill(local, process.pid, *moment)
        try:
            out, _ = await asyncio.to_thread(process.communicate, timeout=PATIENCE_SECONDS)
        finally:
            process.kill()
        return process.returncode, out


def _plan_kill(local: LocalService, pid: int, route: str, number: int, is_executed: bool) -> None:
    seen = 0

    async def fault(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        nonlocal seen
        seen += 1
        if seen < number:
            return await handler(request)
        if is_executed:
            await handler(request)
        if seen == number:
            os.kill(pid, signal.SIGKILL)
        return web.Response(status=503)

    local.faults._plan(route, fault, times=number)


async def test_everything_is_done_once(local: LocalService, engines: Engines, tmp_path: Path) -> None:
    engine, journal = engines(MODEL), tmp_path / "killed.journal"
    engine.done.clear()
    for moment in MOMENTS:
        code, _ = await start(local, journal, moment)
        assert code == -signal.SIGKILL, moment
        local.faults.clear()
    code, out = await start(local, journal, None)
    assert code == 0
    seen = msgspec.json.decode(out.splitlines()[-1], type=Seen)
    assert engine.done == [
        each
        for step in range(STEPS)
        for each in (("forward_backward", prompt(step * GROUPS)[0]), ("optim_step", rate(step)))
    ]
    assert [len(rewards) for _, rewards in seen.results] == [GROUPS] * STEPS
    assert all(len(group) == MEMBERS for _, rewards in seen.results for group in rewards)

    undisturbed = await start(local, tmp_path / "undisturbed.journal", None)
    other = msgspec.json.decode(undisturbed[1].splitlines()[-1], type=Seen)
    assert (other.weights, other.results) == (seen.weights, seen.results)
    assert Counter(engine.done).most_common(1)[0][1] == 2  # this program has done it all once more
