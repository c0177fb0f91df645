"""Schedules of faults: what goes wrong in one program, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from loops_local.faults import Answer, Delay, Drop, Duplicate, Fault, LoseAnswer, Refuse, Stall, Truncate

HTML = "<html><body><h1>Bad Gateway</h1></body></html>"
RETRY_AFTER = (None, None, "0", "1", "-3", "nan", "Mon, 01 Jan 2001 00:00:00 GMT")


class Place(NamedTuple):
    """Requests of one kind.

    `often` is about how many of them a program sends: the more, the less likely a fault is for each. `is_keyed` says
    that the service recognizes a request that it gets twice, so that a network may duplicate it.
    """

    route: str
    often: int
    is_keyed: bool = True


CREATIONS = Place("POST /v1/loops/*", 2, is_keyed=False)
READS = Place("GET /v1/*", 10)
OPERATIONS = Place("POST /trainers/*", 105)
POLLS = Place("GET /trainers/*/operations/*", 105)
FILES = Place("GET /files/*", 3)
SAMPLES = Place("POST */sync/sample", 500, is_keyed=False)
QUEUED_SAMPLES = Place("POST */queue/sample", 500)
QUEUE_POLLS = Place("GET */queue/operations/*", 500)
EVERYTHING = Place("*", 1000, is_keyed=False)

DEDICATED = (CREATIONS, READS, OPERATIONS, OPERATIONS, POLLS, POLLS, FILES, SAMPLES, SAMPLES, EVERYTHING)
QUEUED = (CREATIONS, READS, OPERATIONS, OPERATIONS, POLLS, POLLS, FILES, QUEUED_SAMPLES, QUEUE_POLLS, EVERYTHING)


def schedule(seed: str, *, queued: bool) -> Sequence[Fault]:
    """Return three to eight faults. Each program can end well: none of them happens all the time."""
    rng = random.Random(seed)
    return [_fault(rng, rng.choice(QUEUED if queued else DEDICATED)) for _ in range(rng.randint(3, 8))]


def _fault(rng: random.Random, place: Place) -> Fault:
    when = _when(rng, place)
    kinds = [_drop, _lose_answer, _truncate, _stall, _delay, _busy, _gateway, _unreadable, _refuse]
    if place.is_keyed:
        kinds.append(_duplicate)
    return rng.choice(kinds)(rng, when)


def _when(rng: random.Random, place: Place) -> dict[str, Any]:
    """Return the conditions, so that about one to twenty requests of a program are affected."""
    times = rng.randint(1, 12)
    match rng.choice(("probability", "nth", "every", "window")):
        case "nth":
            first = rng.randint(1, max(1, place.often))
            # Neighbours, so that a repetition meets the fault, too.
            chosen: dict[str, Any] = {"nth": list(range(first, first + rng.randint(1, 3)))}
        case "every":
            chosen = {"every": max(2, place.often // times)}
        case "window":
            begin = rng.uniform(0, 3)
            chosen = {"window": (begin, begin + rng.uniform(0.1, 2)), "times": times, "probability": 0.5}
        case _:
            chosen = {"probability": min(0.5, times / place.often)}
    return {"route": place.route, "times": times, **chosen}


def _drop(_rng: random.Random, when: dict[str, Any]) -> Fault:
    return Drop(**when)


def _lose_answer(_rng: random.Random, when: dict[str, Any]) -> Fault:
    return LoseAnswer(**when)


def _truncate(rng: random.Random, when: dict[str, Any]) -> Fault:
    return Truncate(share=rng.choice((0.0, 0.3, 0.9)), **when)


def _stall(rng: random.Random, when: dict[str, Any]) -> Fault:
    return Stall(seconds=rng.uniform(0.1, 2), executed=rng.random() < 0.5, **_few(when))


def _delay(rng: random.Random, when: dict[str, Any]) -> Fault:
    return Delay(seconds=rng.uniform(0.01, 1), **when)


def _busy(rng: random.Random, when: dict[str, Any]) -> Fault:
    """Not executed, and the service says so."""
    return Answer(status=rng.choice((429, 503)), headers=_retry_after(rng), **when)


def _gateway(rng: random.Random, when: dict[str, Any]) -> Fault:
    """Perhaps executed: a gateway says nothing of what is behind it."""
    status = rng.choice((408, 500, 502, 504))
    return Answer(status=status, headers=_retry_after(rng), body=HTML, executed=rng.random() < 0.5, **when)


def _unreadable(rng: random.Random, when: dict[str, Any]) -> Fault:
    """Executed, with an answer that nobody can read."""
    body = rng.choice((HTML, "", '{"half":', "null", "[" * 2000))
    return Answer(status=rng.choice((200, 202)), body=body, executed=True, **when)


def _refuse(rng: random.Random, when: dict[str, Any]) -> Fault:
    return Refuse(seconds=rng.uniform(0.05, 2), **_few(when))


def _duplicate(_rng: random.Random, when: dict[str, Any]) -> Fault:
    return Duplicate(**when)


def _few(when: dict[str, Any]) -> dict[str, Any]:
    """Faults that take seconds happen three times at most."""
    return {**when, "times": min(3, when["times"])}


def _retry_after(rng: random.Random) -> dict[str, str]:
    value = rng.choice(RETRY_AFTER)
    return {} if value is None else {"Retry-After": value}
