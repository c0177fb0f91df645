"""What a client created and has not deactivated: it costs money, also when the client is closed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Literal, TypeAlias

from msgspec import Struct

from ._progress import stage_line
from ._work.usage import Up
from .errors import ClosedError
from .types import ProvisioningEvent, Run, Sampler

Kind: TypeAlias = Literal["run", "sampler"]

log = logging.getLogger("loops_async.provisioning")


class _Up(Struct):
    """Since and until when something was there, as far as this client knows."""

    kind: Kind
    since: float
    until: float | None = None


class Running:
    """The runs and standalone samplers that one client created, and which of all were deactivated through it.

    A paired sampler runs as long as its run, and is not listed beside it. `on_deactivated` is called with each id.
    """

    def __init__(self, on_deactivated: Callable[[str], object] | None = None) -> None:
        self._on_deactivated = on_deactivated
        self._created: dict[str, Run | Sampler] = {}
        self._up: dict[str, _Up] = {}
        self._deactivated: set[str] = set()

    def add(self, created: Run | Sampler) -> None:
        """Record what the service created for this client."""
        self._created[created.id] = created
        self._up[created.id] = _Up(kind_of(created), monotonic())
        self._deactivated.discard(created.id)

    def get(self, id_: str) -> Run | Sampler | None:
        """Return what this client created and has not deactivated."""
        return self._created.get(id_)

    def leave(self, id_: str) -> None:
        """Keep it running without a word, as the user asked."""
        self._created.pop(id_, None)

    def take_all(self) -> list[Run | Sampler]:
        """Return everything, which is then no longer this client's concern."""
        created, self._created = self._created, {}
        for id_ in created:
            self._up[id_].until = monotonic()
        return list(created.values())

    def up(self) -> list[Up]:
        """Return for how long what was created has been there; in any thread."""
        now = monotonic()
        return [Up(id_, up.kind == "run", (up.until or now) - up.since) for id_, up in dict(self._up).items()]

    def deactivated(self, id_: str, kind: Kind) -> None:
        """Record that a run or a sampler was deactivated, whichever client created it."""
        self._created.pop(id_, None)
        if id_ in self._deactivated:
            return
        self._deactivated.add(id_)
        if self._on_deactivated is not None:
            self._on_deactivated(id_)
        seconds, up = 0.0, self._up.get(id_)
        if up is not None:
            up.until = monotonic()
            seconds = up.until - up.since
        log.info("%s", stage_line(ProvisioningEvent(kind=kind, id=id_, stage="deactivated", seconds=seconds)))

    def deployment_deactivated(self, deployment_id: str) -> None:
        """Record that the trainers of a deployment were deactivated."""
        for created in list(self._created.values()):
            if isinstance(created, Run) and created.deployment_id == deployment_id:
                self.deactivated(created.id, "run")

    def is_deactivated(self, id_: str | None) -> bool:
        """Whether a run or a sampler was deactivated through this client."""
        return id_ in self._deactivated

    def check(self, *, run_id: str | None = None, sampler_id: str | None = None) -> None:
        """Raise `ClosedError` if the run or the sampler was deactivated through this client."""
        for kind, id_ in (("run", run_id), ("sampler", sampler_id)):
            if id_ in self._deactivated:
                raise ClosedError(f"{kind} {id_} was deactivated through this client; create or attach to another one")


def kind_of(created: Run | Sampler) -> Kind:
    """Return ``run`` or ``sampler``."""
    return "run" if isinstance(created, Run) else "sampler"
