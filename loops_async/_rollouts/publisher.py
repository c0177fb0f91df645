"""Publishing the trainer's weights, and the weights that rollouts sample."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .._tasks import TaskOwner
from ..errors import ClosedError
from ..sampling import SamplingClient
from .gate import StalenessGate
from .policy import Policy, Trainer

__all__ = ["Publisher"]


class Publisher:
    """Publishes the weights of the steps that the gate has handed out.

    A publication is a task of its own: a caller that is cancelled does not stop it. An error that no caller has seen
    is kept for the next one.
    """

    def __init__(
        self, trainer: Trainer, gate: StalenessGate, name: str, *, tasks: TaskOwner, on_change: Callable[[], None]
    ) -> None:
        self._trainer = trainer
        self._gate = gate
        self._name = name
        self._tasks = tasks
        self._on_change = on_change
        self._policy: Policy[SamplingClient] | None = None
        self._in_flight = 0
        self._failure: BaseException | None = None

    @property
    def policy(self) -> Policy[SamplingClient]:
        """The newest weights that are served."""
        if self._policy is None:
            raise ClosedError("the stream is not open: entering it publishes the first weights")
        return self._policy

    @property
    def is_publishing(self) -> bool:
        """Whether a publication is under way."""
        return self._in_flight > 0

    def raise_failure(self) -> None:
        """Raise the error of a publication that no caller has seen yet."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    async def publish(self, *, wait: bool) -> None:
        """Publish; without `wait`, return when the save has its turn among the trainer's operations."""
        self.raise_failure()
        turn = asyncio.get_running_loop().create_future()
        publication = self._tasks.start(self._publish(self._gate.step, turn), name=f"publish {self._name}")
        self._in_flight += 1
        publication.add_done_callback(self._ended)
        await asyncio.wait([publication] if wait else [publication, turn], return_when=asyncio.FIRST_COMPLETED)
        if publication.cancelled():
            raise ClosedError("the stream was left before the weights were published")
        if publication.done() and (error := publication.exception()) is not None:
            self._failure = None if self._failure is error else self._failure
            raise error

    async def _publish(self, step: int, turn: asyncio.Future[None]) -> None:
        served = await self._trainer.publish(self._name)
        turn.set_result(None)
        policy = await served
        if step >= self._gate.version:
            # No `await` between: no group may begin with the version of one policy and the weights of another.
            self._policy = policy
            self._gate.publish(step)

    def _ended(self, publication: asyncio.Task[None]) -> None:
        self._in_flight -= 1
        if not publication.cancelled():
            self._failure = publication.exception() or self._failure
        self._on_change()
