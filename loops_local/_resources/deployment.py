"""Deployments: the states that a trainer or sampler goes through, as a function of the clock.

No task runs for a deployment, so hundreds cost nothing: its state is worked out whenever somebody looks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

from loops_async.protocol import SCALED_TO_ZERO

from .engine import Engine
from .journal import Log
from .meter import Meter
from .models import ModelHost
from .records import DeploymentRecord
from .web import HttpError, deactivated, deploying, terminal

__all__ = ["Deployment"]

logger = logging.getLogger(__name__)


class _Words(Struct, frozen=True):
    """What the states are called. Source: control-plane reference 5."""

    rising: tuple[str, ...]
    waking: tuple[str, ...]
    ready: str
    failed: str
    stopped: str


_WORDS = {
    "trainer": _Words(("CREATED", "DEPLOYING"), ("DEPLOYING",), "RUNNING", "FAILED", "STOPPED"),
    "sampler": _Words(
        ("BUILDING", "DEPLOYING", "LOADING_MODEL"), ("WAKING_UP",), "ACTIVE", "DEPLOY_FAILED", "INACTIVE"
    ),
}


class Deployment:
    """What a trainer or sampler runs on.

    It rises for `rise_seconds` and until its model is loaded, falls asleep when it was not used for its
    `scale_down_delay_seconds`, and rises again when it is used. After a restart of the service it sleeps.
    """

    def __init__(self, record: DeploymentRecord, host: ModelHost, rise_seconds: float, log: Log) -> None:
        self.record = record
        self.host = host
        self.log = log
        self.meter = Meter()
        self._rise_seconds = rise_seconds
        self._words = _WORDS[record.kind]
        self._stages = self._words.rising
        self._loading: asyncio.Future[Engine] | None = None
        self._started = 0.0
        self._last_used = 0.0
        self._users = 0

    def start(self) -> None:
        """Begin to rise."""
        self.log.write("INFO", f"deploying a {self.record.kind} of {self.host.name}")
        self._loading = self.host.load()
        self._loading.add_done_callback(self._note_loaded)
        self._started = self._last_used = time.monotonic()

    def _note_loaded(self, loading: asyncio.Future[Engine]) -> None:
        if loading.cancelled():
            return
        if error := loading.exception():
            self.log.write("ERROR", f"cannot load {self.host.name}: {error}")
            logger.error("%s of %s failed: %s", self.record.kind, self.host.name, error)
        else:
            model = loading.result().model
            self.log.write("INFO", f"loaded {model.name} ({model.arch}, {model.max_seq_len} tokens at most)")

    @property
    def status(self) -> str:
        """The state, in the words of the control plane."""
        if self.record.stopped:
            return self._words.stopped
        if self._asleep:
            return SCALED_TO_ZERO
        if self.failure is not None:
            return self._words.failed
        risen = self._risen
        if risen < 1:
            return self._stages[int(risen * len(self._stages))]
        return self._words.ready if self._loaded else self._stages[-1]

    @property
    def ready(self) -> bool:
        """Whether it can be used now."""
        return self.status == self._words.ready

    @property
    def failure(self) -> str | None:
        """Why the model could not be loaded."""
        if self._loading is None or not self._loading.done() or self._loading.cancelled():
            return None
        error = self._loading.exception()
        return None if error is None else str(error) or repr(error)

    @property
    def users(self) -> int:
        """How many requests and operations are at it."""
        return self._users

    @property
    def _loaded(self) -> bool:
        return self._loading is not None and self._loading.done()

    @property
    def _risen(self) -> float:
        """How far it has risen, from 0 to 1 and beyond."""
        elapsed = time.monotonic() - self._started
        return elapsed / self._rise_seconds if self._rise_seconds > 0 else 1.0

    @property
    def _asleep(self) -> bool:
        if self._loading is None:
            return True
        idle = time.monotonic() - self._last_used
        return not self._users and idle > self.record.scale_down_delay_seconds and self._risen >= 1

    def wake(self) -> None:
        """Note a use; begin to rise when it sleeps."""
        if self._asleep and not self.record.stopped:
            self.log.write("INFO", "waking up")
            self._stages = self._words.waking
            self.start()
        self._last_used = time.monotonic()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep it from falling asleep."""
        self.wake()
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._last_used = time.monotonic()

    def problem(self, *, status_while_rising: int = 400) -> HttpError | None:
        """Return what stands in the way of a request now."""
        if self.record.stopped:
            return deactivated(self.record.kind)
        if self.failure is not None:
            return terminal(self.record.kind, self.failure)
        return None if self.ready else deploying(self.record.kind, self.status, code=status_while_rising)

    def check(self) -> None:
        """Refuse a request to a deployment that never was up; one that sleeps wakes and takes it."""
        self.wake()
        waking = self._stages is self._words.waking and self.failure is None and not self.record.stopped
        if not waking and (problem := self.problem()) is not None:
            raise problem

    async def risen(self) -> Engine:
        """Wait until it is up, and return its engine."""
        self.wake()
        loading = self._loading
        if loading is None:
            raise deactivated(self.record.kind)
        await asyncio.sleep(max(0.0, self._started + self._rise_seconds - time.monotonic()))
        return await asyncio.shield(loading)

    def stop(self) -> None:
        """Switch it off for good."""
        self.record.stopped = True
        self.log.write("INFO", "deactivated")
