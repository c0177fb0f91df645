"""Metrics of the caller's own, for a service that shows them: its capabilities say ``metrics: true``."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping
from typing import Any, Final

import anyio

from .._http.endpoint import Endpoint
from .._http.retry import READ, retry
from .._session.runtime import Runtime
from ..errors import ApiError, LoopsError
from ..protocol import MAX_METRIC_STEPS, OwnMetrics, OwnMetricsBody, encode
from ..types import LocalDeployment
from ..types.tensors import plain_number

log = logging.getLogger("loops_async.operations")

REQUEST_SECONDS: Final = 30.0
_LARGEST: Final = sys.float_info.max
LAST_SECONDS: Final = 5.0
"""How long the end of a training client waits for the last metrics to be sent."""


class OwnMetricsSender:
    """Sends the metrics of steps, several in one request, without delaying training.

    A service without the capability and a trainer without a control plane get nothing. If the service refuses, or
    cannot be reached, there is one warning, and nothing more is sent.
    """

    def __init__(self, endpoint: Endpoint, runtime: Runtime) -> None:
        self.is_wanted: bool = not isinstance(endpoint.deployment, LocalDeployment)
        """Whether the service shows metrics, as far as it is known."""
        self._has_said_so = False
        self._endpoint = endpoint
        self._runtime = runtime
        self._waiting: list[OwnMetrics] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the numbers among the metrics of a step; if too many steps wait, the oldest are dropped."""
        numbers = _numbers(metrics)
        if not self.is_wanted or not numbers:
            return
        self._waiting = [*self._waiting[1 - MAX_METRIC_STEPS :], OwnMetrics(step=step, metrics=numbers)]
        if self._task is None or self._task.done():
            name = f"send metrics of run {self._endpoint.run_id}"
            self._task = self._runtime.tasks.start_unattended(self._send(), name=name)

    async def flush(self) -> None:
        """Send what waits, within 5 s."""
        with anyio.move_on_after(LAST_SECONDS, shield=True):
            if self._task is not None:
                await asyncio.wait([self._task])
            if self._waiting:  # the task was cancelled, since the service client is being closed
                await self._send()

    async def _send(self) -> None:
        try:
            self.is_wanted = self._has_said_so = self._has_said_so or await self._asked()
            while self.is_wanted and self._waiting:
                await self._send_all(self._waiting)
        except LoopsError as error:
            log.warning("the metrics of run %s are no longer sent: %s", self._endpoint.run_id, error)
            self.is_wanted = False
        if not self.is_wanted:
            self._waiting = []

    async def _asked(self) -> bool:
        try:
            return (await self._runtime.control_plane.get_capabilities()).metrics
        except ApiError:  # a service without the route does not show metrics either
            return False

    async def _send_all(self, rows: list[OwnMetrics]) -> None:
        """Send rows. They wait until they have arrived; sent again, they change nothing."""
        transport = self._runtime.transport
        request = self._endpoint.request(
            "POST",
            "/metrics",
            f"send metrics of run {self._endpoint.run_id}",
            body=encode(OwnMetricsBody(steps=rows)),
            timeout=REQUEST_SECONDS,
        )
        await retry(
            lambda: transport.ask(request), READ, what="metrics could not be sent", budget=transport.retry_budget
        )
        sent = set(map(id, rows))
        self._waiting = [row for row in self._waiting if id(row) not in sent]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return what a curve can be drawn of."""
    plain = ((name, plain_number(value)) for name, value in metrics.items())
    return {name: float(value) for name, value in plain if isinstance(value, int | float) and abs(value) <= _LARGEST}
