"""Deployments: the states that a trainer or sampler goes through, as a function of the clock.

No task runs for a deployment, so hundreds cost nothing: its state is computed when it is needed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

from loops_async.protocol import SCALED_TO_ZERO

from .._errors import HttpError, deactivated, deploying, failed_to_deploy
from .._execution.models import ModelHost
from .._storage.logs import DeploymentLog
from .._storage.records import DeploymentRecord
from ..engine import Engine
from .metrics import RequestMetrics

__all__ = ["Deployment"]

logger = logging.getLogger("loops_local.provisioning")


class _Statuses(Struct, frozen=True):
    """The names of the states. Source: control-plane reference 5."""

    starting: tuple[str, ...]
    restarting: tuple[str, ...]
    active: str
    failed: str
    deactivated: str


_STATUSES = {
    "trainer": _Statuses(("CREATED", "DEPLOYING"), ("DEPLOYING",), "RUNNING", "FAILED", "STOPPED"),
    "sampler": _Statuses(
        ("BUILDING", "DEPLOYING", "LOADING_MODEL"), ("WAKING_UP",), "ACTIVE", "DEPLOY_FAILED", "INACTIVE"
    ),
}


class Deployment:
    """The compute that a trainer or sampler runs on.

    Starting takes `provisioning_seconds`, or longer if the model is not loaded by then. A deployment that is not used
    for `scale_down_delay_seconds` is scaled to zero, and starts again at the next use. After a restart of the service,
    all are scaled to zero.
    """

    def __init__(
        self, record: DeploymentRecord, host: ModelHost, provisioning_seconds: float, log: DeploymentLog
    ) -> None:
        self.record = record
        self.host = host
        self.log = log
        self.metrics = RequestMetrics()
        self._provisioning_seconds = provisioning_seconds
        self._statuses = _STATUSES[record.kind]
        self._starting = self._statuses.starting
        self._loading: asyncio.Task[Engine] | None = None
        self._started_at = 0.0
        self._last_used = 0.0
        self._in_flight = 0
        self.used_at: float | None = None
        """When a request or an operation last ended, in seconds since 1970."""

    def start(self) -> None:
        """Start provisioning."""
        self._note(f"deploying a {self.record.kind} of {self.host.name}")
        self._loading = self.host.load()
        self._loading.add_done_callback(self._log_loaded)
        self._started_at = self._last_used = time.monotonic()

    def _log_loaded(self, loading: asyncio.Task[Engine]) -> None:
        if loading.cancelled():
            return
        if error := loading.exception():
            self.log.write("ERROR", f"cannot load {self.host.name}: {error}")
            logger.error("%s of %s failed: %s", self.record.kind, self.host.name, error)
        else:
            model = loading.result().model
            self._note(f"loaded {model.name} ({model.arch}, {model.max_seq_len} tokens at most)")

    def _note(self, message: str) -> None:
        """Write a line to the log of the deployment, and to that of the service."""
        self.log.write("INFO", message)
        logger.info("deployment %s: %s", self.record.id, message)

    @property
    def status(self) -> str:
        """The state, by its name in the control plane."""
        if self.record.stopped:
            return self._statuses.deactivated
        if self._scaled_to_zero:
            return SCALED_TO_ZERO
        if self.failure is not None:
            return self._statuses.failed
        progress = self._progress
        if progress < 1:
            return self._starting[int(progress * len(self._starting))]
        return self._statuses.active if self._loading and self._loading.done() else self._starting[-1]

    @property
    def failure(self) -> str | None:
        """Why the model could not be loaded."""
        if self._loading is None or not self._loading.done() or self._loading.cancelled():
            return None
        error = self._loading.exception()
        return None if error is None else str(error) or repr(error)

    @property
    def in_flight(self) -> int:
        """The number of requests and operations that use it now."""
        return self._in_flight

    @property
    def _progress(self) -> float:
        """The elapsed part of the provisioning time; 1 or more when it is over."""
        elapsed = time.monotonic() - self._started_at
        return elapsed / self._provisioning_seconds if self._provisioning_seconds > 0 else 1.0

    @property
    def _scaled_to_zero(self) -> bool:
        if self._loading is None:
            return True
        idle = time.monotonic() - self._last_used
        return not self._in_flight and idle > self.record.scale_down_delay_seconds and self._progress >= 1

    def keep_active(self) -> None:
        """Reset the idle time; start again if it is scaled to zero."""
        if self._scaled_to_zero and not self.record.stopped:
            self._note("scaling up from zero")
            self._starting = self._statuses.restarting
            self.start()
        self._last_used = time.monotonic()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep it active inside the block."""
        self.keep_active()
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            self._last_used, self.used_at = time.monotonic(), time.time()

    def problem(self, *, status_while_starting: int = 400) -> HttpError | None:
        """Return the error for a request that needs an active deployment, None if it is active."""
        if self.record.stopped:
            return deactivated(self.record.kind)
        if self.failure is not None:
            return failed_to_deploy(self.record.kind, self.failure)
        status = self.status
        if status == self._statuses.active:
            return None
        return deploying(self.record.kind, status, code=status_while_starting)

    def check(self) -> None:
        """Refuse a request before the first start is complete; after scaling to zero, requests wait for the start."""
        self.keep_active()
        restarting = self._starting is self._statuses.restarting and self.failure is None and not self.record.stopped
        if not restarting and (problem := self.problem()) is not None:
            raise problem

    async def active_engine(self) -> Engine:
        """Wait until it is active, and return its engine."""
        self.keep_active()
        loading = self._loading
        if loading is None:
            raise deactivated(self.record.kind)
        await asyncio.sleep(max(0.0, self._started_at + self._provisioning_seconds - time.monotonic()))
        return await asyncio.shield(loading)

    def deactivate(self) -> None:
        """Stop it; it never starts again."""
        self.record.stopped = True
        self._note("deactivated")
