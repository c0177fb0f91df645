"""What can go wrong with a request, and for which requests it does: a plan is a list of faults.

A plan file is TOML or JSON with the list under ``faults``::

    [[faults]]
    fault = "answer"            # the service executes the request, and a gateway answers 504 in its place
    route = "POST */sample"
    status = 504
    executed = true
    probability = 0.02

    [[faults]]
    fault = "drop"              # every tenth poll between second 5 and second 60
    route = "GET */operations/*"
    every = 10
    window = [5, 60]
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeAlias

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

__all__ = [
    "Answer",
    "AnyFault",
    "Delay",
    "Drop",
    "Duplicate",
    "Exchange",
    "Fault",
    "LoseAnswer",
    "Refuse",
    "Stall",
    "Truncate",
    "read_plan",
]

Seconds: TypeAlias = Annotated[float, Meta(ge=0)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Count: TypeAlias = Annotated[int, Meta(ge=1)]


class Exchange(Protocol):
    """One request, and what can be done with it."""

    async def execute(self) -> web.Response:
        """Let the service execute the request; return its answer, which is not passed on by that."""

    async def pass_on(self, *, share: float = 1.0) -> web.StreamResponse:
        """Let the service execute the request and pass its answer on; break off after `share` of the body."""

    def reset(self) -> web.StreamResponse:
        """Reset the connection."""

    def refuse(self, seconds: float) -> web.StreamResponse:
        """Reset every connection, and refuse new ones for `seconds`."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""


class Fault(Struct, frozen=True, kw_only=True, tag_field="fault", forbid_unknown_fields=True):
    """A fault, and to which requests it happens. All conditions that are given must hold.

    Attributes:
        route: a pattern of ``"METHOD /path"``, e.g. ``"POST */sample"``; ``*`` matches any text.
        probability: how likely it happens to a request for which the other conditions hold.
        nth: only to these requests of the route, counted from 1.
        every: only to every n-th request of the route.
        window: only from the first to the second of these seconds since the proxy was started.
        times: at most so often.
    """

    route: str = "*"
    probability: Share = 1.0
    nth: Sequence[Count] = ()
    every: Count = 1
    window: tuple[Seconds, Seconds] | None = None
    times: Count | None = None

    def __post_init__(self) -> None:
        # What cannot hold for any request would be a fault that never happens, without a word.
        if not re.search(r"[ *?\[]", self.route):
            raise ValueError(f'route must be a pattern of "METHOD /path", e.g. "POST */sample"; got {self.route!r}')
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError(f"window must begin before it ends; got {list(self.window)}")

    def matches(self, method: str, path: str) -> bool:
        """Whether a request is one of `route`."""
        return fnmatchcase(f"{method} {path}", self.route)

    def is_due(self, number: int, *, seconds: float, happened: int, draw: str) -> bool:
        """Whether it happens to request `number` of the route.

        `draw` names the decision: the same name gives the same decision, whatever else is decided before.
        """
        return (
            (not self.nth or number in self.nth)
            and number % self.every == 0
            and (self.window is None or self.window[0] <= seconds < self.window[1])
            and (self.times is None or happened < self.times)
            and random.Random(draw).random() < self.probability  # noqa: S311 - repeatable, keeps no secret
        )

    async def happen(self, exchange: Exchange) -> web.StreamResponse:
        """Make it happen to one request."""
        raise NotImplementedError


class Refuse(Fault, frozen=True, kw_only=True, tag="refuse"):
    """Reset every connection, and refuse new ones for `seconds`, as a service that restarts does."""

    seconds: Seconds = 1.0

    async def happen(self, exchange: Exchange) -> web.StreamResponse:
        return exchange.refuse(self.seconds)


class Drop(Fault, frozen=True, kw_only=True, tag="drop"):
    """Reset the connection; the service does not see the request."""

    async def happen(self, exchange: Exchange) -> web.StreamResponse:
        return exchange.reset()


class LoseAnswer(Fault, frozen=True, kw_only=True, tag="lose_answer"):
    """Let the service execute the request, then reset the connection instead of answering."""

    async def happen(self, exchange: Exchange) -> web.StreamResponse:
        await exchange.execute()
        return exchange.reset()


class Truncate(Fault, frozen=True, kw_only=True, tag="truncate"):
    """Let the service execute the request, and break its answer off after `share` of the body."""

    share: Share = 0.5

    async def happen(self, exchange: Exchange) -> web.StreamResponse:
        return await exchange.pass_on(share=self.share)


class Stall(Fault, frozen=True, kw_only=True, tag="stall"):
    """Send nothing for `seconds`, then reset the connection; `executed` says whether the service sees the request."""

    seconds: Seconds = 30.0
    executed: bool = False

    async def happen(self, exchange: Exchange) -> web.StreamResponse:
        if self.executed:
            await exchange.execute()
        await exchange.sleep(self.seconds)
        return exchange.reset()


class Delay(Fault, frozen=True, kw_only=True, tag="delay"):
    """Wait `seconds` before the service sees the request."""

    seconds: Seconds = 1.0

    async def happen(self, exchange: Exchange) -> web.StreamResponse:
        await exchange.sleep(self.seconds)
        return await exchange.pass_on()


class Answer(Fault, frozen=True, kw_only=True, tag="answer"):
    """Respond in the place of the service, as a gateway does; `executed` says whether the service sees the request.

    `body` is sent as JSON, text and bytes as they are; None is an error that says where it comes from.
    """

    status: Annotated[int, Meta(ge=200, le=599)] = 503
    headers: Mapping[str, str] = {}
    body: Any = None
    executed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.headers.items():
            if not f"{name}{value}".isprintable():
                raise ValueError(f"headers must be of printable characters; got {name!r}: {value!r}")

    async def happen(self, exchange: Exchange) -> web.StreamResponse:
        if self.executed:
            await exchange.execute()
        body = {"error": "injected by the fault proxy"} if self.body is None else self.body
        kind = "text/html" if isinstance(body, str | bytes) else "application/json"
        return web.Response(status=self.status, body=_encoded(body), headers={"Content-Type": kind, **self.headers})


class Duplicate(Fault, frozen=True, kw_only=True, tag="duplicate"):
    """Send the request to the service twice, and pass the second answer on."""

    async def happen(self, exchange: Exchange) -> web.StreamResponse:
        await exchange.execute()
        return await exchange.pass_on()


AnyFault: TypeAlias = Refuse | Drop | LoseAnswer | Truncate | Stall | Delay | Answer | Duplicate


class _Plan(Struct, forbid_unknown_fields=True):
    faults: list[AnyFault]


def read_plan(path: Path) -> Sequence[Fault]:
    """Read a plan from a TOML file, or from a JSON file if its name ends in ``.json``.

    Raises:
        ValueError: it is not a plan; the text says where.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        parsed = msgspec.json.decode(content) if path.suffix == ".json" else tomllib.loads(content.decode())
        return msgspec.convert(parsed, _Plan).faults
    except ValueError as problem:  # of JSON, of TOML, of text and of the plan's types
        raise ValueError(f"{path}: {problem}") from None


def _encoded(body: Any) -> bytes:
    if isinstance(body, bytes):
        return body
    return body.encode() if isinstance(body, str) else msgspec.json.encode(body)
