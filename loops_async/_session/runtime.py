"""The state that all clients of one service share: connections, background tasks, heartbeat and control plane."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

from .._http.endpoint import Endpoint
from .._http.settings import Settings
from .._http.transport import Transport
from .._journal.journal import Journal
from .._operations.turns import Turns
from .._running import Running
from .._tasks import SingleFlight, TaskOwner, run_to_completion
from .._work.registry import CURRENT
from .._work.waits import Waits
from ..control_plane import ControlPlane, RunLedger, control_plane
from ..types import BasetenDeployment
from .deactivation import Leftovers, OnExit
from .heartbeat import Heartbeat
from .readiness import SamplerGate
from .unclosed import UnclosedGuard


class Admission(asyncio.Semaphore):
    """Limits the samples in flight, and reports that samples have waited long for their turn."""

    def __init__(self, limit: int, waits: Waits) -> None:
        super().__init__(limit)
        self._what = f"one of the {limit} samples in flight to end (BT_LOOPS_MAX_CONNECTIONS)"
        self._waits = waits

    async def acquire(self) -> Literal[True]:
        if not self.locked():
            return await super().acquire()
        CURRENT.get().waiting_for = "admission"
        with self._waits.on(self._what):
            return await super().acquire()

    @property
    def free(self) -> int:
        """How many more samples may be in flight."""
        return self._value


class Runtime:
    """The shared state of one open service client; belongs to one event loop. It closes the `journal` that it gets."""

    def __init__(self, settings: Settings, on_exit: OnExit = "leave", journal: Journal | None = None) -> None:
        self.settings: Settings = settings
        self.journal: Journal | None = journal
        self.transport: Transport = Transport(settings)
        self.tasks: TaskOwner = TaskOwner()
        self.heartbeat: Heartbeat = Heartbeat(self.tasks)
        self.running: Running = Running(None if journal is None else journal.ended)
        self.transport.work.up = self.running.up
        self.ledger: RunLedger = RunLedger(self.running)
        self.control_plane: ControlPlane = control_plane(self.transport, settings.base_url, self.ledger, self.running)
        self.leftovers: Leftovers = Leftovers(self.running, self.control_plane, on_exit, settings.base_url)
        self.admission: Admission = Admission(settings.max_connections, self.transport.waits)
        admission, most = self.admission, settings.max_connections
        self.transport.work.facts["samples in flight"] = lambda: f"{most - admission.free} of {most}"
        self.tokenizers: SingleFlight[str, Any] = SingleFlight(self.tasks)
        """By base model."""
        self._gates: dict[str, SamplerGate] = {}
        self._turns: dict[str, Turns] = {}
        self._guard: UnclosedGuard | None = None
        self._closing = asyncio.Lock()

    def turns(self, run_id: str) -> Turns:
        """Return the turns of a run's operations, which all of its clients share."""
        return self._turns.setdefault(run_id, Turns())

    def gate(self, sampler: Endpoint) -> SamplerGate | None:
        """Return the gate that all clients of a deployment share; None for a sampler that is always ready."""
        match sampler.deployment:
            case BasetenDeployment(base_url=url, model_id=str() as model_id, deployment_id=str() as deployment_id):
                pass
            case _:
                return None
        gate = self._gates.get(deployment_id)
        if gate is None:
            gate = self._gates[deployment_id] = SamplerGate(
                url,
                model_id,
                deployment_id,
                transport=self.transport,
                control_plane=self.control_plane,
                tasks=self.tasks,
            )
        return gate

    def warn_if_unclosed(self, client: str) -> None:
        """Close this and name `client` in a warning when no client refers to this any longer, or when the loop ends."""
        self.transport.work.client = client
        abandon = partial(_abandon, self.tasks, self.leftovers, self.transport, self.journal)
        self._guard = UnclosedGuard(self, client, abandon)

    async def close(self) -> None:
        """End all tasks, settle what was created, then close all connections, even if the caller is cancelled."""
        if self._guard is not None:
            await self._guard.disarm()
        await run_to_completion(self._close())

    async def _close(self) -> None:
        async with self._closing:  # closing again must not disconnect what is still deactivated
            await self.tasks.close()
            await self.leftovers.settle()
            await self.transport.close()
            if self.journal is not None:
                await self.journal.close()


async def _abandon(tasks: TaskOwner, leftovers: Leftovers, transport: Transport, journal: Journal | None) -> None:
    """Close the parts of a runtime that nothing refers to: it only names what runs, since the loop may be ending."""

    async def close() -> None:
        await tasks.close()
        leftovers.name()
        await transport.close()
        if journal is not None:
            await journal.close()

    await run_to_completion(close())


_OpenRuntime: TypeAlias = tuple[Runtime, AsyncIterator[Runtime]]
"""A runtime, and the generator that keeps it open."""

_detached: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str | None], _OpenRuntime]] = (
    WeakKeyDictionary()
)
"""By event loop, then by service and authorization, so that a changed API key takes effect."""


async def detached_runtime(endpoint: Endpoint) -> Runtime:
    """Return this event loop's runtime for a value that was unpickled and has no service client.

    An asynchronous generator keeps it open. The loop ends such generators when it shuts down (`asyncio.run` and
    `anyio.run` do that), which closes the connections.
    """
    settings = endpoint.settings()
    runtimes = _detached.setdefault(asyncio.get_running_loop(), {})
    key = settings.base_url, settings.authorization.get("Authorization")
    if key not in runtimes:
        holder = _keep_open(settings)
        runtimes[key] = (await anext(holder), holder)
    return runtimes[key][0]


async def _keep_open(settings: Settings) -> AsyncIterator[Runtime]:
    runtime = Runtime(settings)
    try:
        yield runtime
    finally:
        await runtime.close()
        # The loop is ending. Its runtimes refer to it and would keep it in memory.
        _detached.pop(asyncio.get_running_loop(), None)
