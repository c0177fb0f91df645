"""Change the answers of every route, and look for errors that no caller could expect.

Anything that a call raises must be a `LoopsError`, or an `OSError` of a download; must be picklable and bounded, and
must not show the key. What is not is printed with its smallest input. Exits with 1 when there is any.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import pickle
import random
import re
import sys
import time
import traceback
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from msgspec import Struct

import loops_async as loops
from loops_local import LocalService

from .answers import Mutation
from .answers import mutations as answer_mutations
from .calls import CALLS, Call, Lane, outcome
from .unseen import unseen_errors

EXAMPLES_OF_A_ROUND: Final = 20
LONGEST_ERROR: Final = 20_000
ALWAYS: Final = 1_000_000
SHRINK_SECONDS: Final = 5.0
"""How long one failure is made smaller."""

_NAMES: Final = re.compile(r"/\S+|[0-9a-z]*[0-9][0-9a-z]*")
"""Paths, ids and numbers, which differ between failures with the same cause."""


class Change(Struct, frozen=True):
    """What is changed in answers, and in how many."""

    mutations: list[Mutation]
    times: int

    def __str__(self) -> str:
        mutations = ", ".join(f"{mutation!r:.200}" for mutation in self.mutations)
        return f"{mutations}, {'always' if self.times == ALWAYS else 'once'}"


class Failure(NamedTuple):
    """What went wrong after a change: `kind` is equal for failures with the same cause."""

    kind: str
    change: Change | None
    text: str


class FoundError(Exception):
    """Tells hypothesis that there is something to make smaller."""


# Drawing is slow, and so one change is for all calls.
changes = st.builds(Change, st.lists(answer_mutations, min_size=1, max_size=3), st.sampled_from((1, 1, 1, ALWAYS)))


class Fuzz:
    """Makes every call after each change, all at once, and keeps the smallest change of each kind of failure."""

    def __init__(self, form: str, seed: str, until: float) -> None:
        self._form = form
        self._calls = [call for call in CALLS if call.only in ("", form)]
        self._seed = seed
        self._until = until
        self._runner = asyncio.Runner()
        self._lanes: list[Lane] = []
        self._stack = AsyncExitStack()
        self.answers: Counter[str] = Counter()
        self.failures: dict[str, Failure] = {}
        self.concerned: dict[str, set[str]] = {}

    def run(self) -> None:
        """Run rounds until the time is over."""
        with self._runner:
            self._runner.run(self._open())
            number = 0
            while time.monotonic() < self._until:
                number += 1
                self._round(number)
            with unseen_errors() as unseen:
                self._runner.run(self._stack.aclose())
                gc.collect()
            for line in unseen:
                self.failures[line] = Failure(f"unseen when the clients were closed: {line[:80]}", None, line)

    def _round(self, number: int) -> None:
        """Let hypothesis draw changes; it makes the first new failure smaller, and the next round goes on."""
        known = set(self.failures)
        until = self._until

        @hypothesis_seed(f"{self._seed}/{number}")
        @settings(
            max_examples=EXAMPLES_OF_A_ROUND,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(changes)
        def batch(change: Change) -> None:
            nonlocal until
            if time.monotonic() > until:
                return
            failures = self._runner.run(self._batch(change))
            for failure in failures:
                smallest = self.failures.get(failure.kind)
                if smallest is None or len(str(failure.change)) < len(str(smallest.change)):
                    self.failures[failure.kind] = failure
            if any(failure.kind not in known for failure in failures):
                until = min(until, time.monotonic() + SHRINK_SECONDS)
                raise FoundError

        try:
            batch()
        except Exception as error:  # FoundError, or hypothesis says that it came and went
            if not self.failures:
                raise AssertionError("hypothesis failed, and nothing was found") from error

    async def _open(self) -> None:
        local = await self._stack.enter_async_context(
            LocalService(
                engine="echo", serverless=self._form == "queued", provisioning_seconds=0.0, poll_hold_seconds=1.0
            )
        )
        self._lanes = [Lane(local) for _ in self._calls]
        for lane in self._lanes:
            await lane.open()
            self._stack.push_async_callback(lane.close)

    async def _batch(self, change: Change) -> list[Failure]:
        with unseen_errors() as unseen:
            found = await asyncio.gather(
                *(self._one(lane, call, change) for lane, call in zip(self._lanes, self._calls, strict=True))
            )
        failures = [failure for failure in found if failure is not None]
        return failures + [Failure(f"unseen: {_NAMES.sub('…', line)[:150]}", change, line) for line in unseen]

    async def _one(self, lane: Lane, call: Call, change: Change) -> Failure | None:
        lane.change.begin(call.route, change.mutations, times=change.times)
        error = await outcome(lane, call)
        lane.change.times = 0
        self.answers[call.name] += len(lane.change.seen)
        problem = None if error is None else _problem(error, call, lane.secret)
        if error is not None and call.breaks:
            await lane.renew()
        if problem is None:
            return None
        self.concerned.setdefault(problem, set()).add(f"{call.name} ({call.route})")
        return Failure(problem, change, " | ".join(lane.change.seen[:3]))


def _problem(error: BaseException, call: Call, secret: str) -> str | None:
    """Return what is wrong with an error, if anything is."""
    if not isinstance(error, loops.LoopsError):
        if isinstance(error, OSError) and call.name == "download_checkpoint":
            return None
        places = traceback.extract_tb(error.__traceback__)
        where = f"{Path(places[-1].filename).name}:{places[-1].lineno}" if places else str(error)
        return f"{type(error).__name__} at {where}"
    text = str(error)
    if len(text) > LONGEST_ERROR:
        return f"{type(error).__name__} with a text of over {LONGEST_ERROR} characters"
    if secret in text:
        return f"{type(error).__name__} that shows the key"
    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception as problem:
        return f"{type(error).__name__} that does not pickle: {problem!r:.100}"
    return None if str(again) == text else f"{type(error).__name__} that pickles to another text"


def main() -> int:
    """Fuzz as long as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="default: a new one")
    asked = parser.parse_args()
    print(f"fuzz: seed {asked.seed}; again with: python -m tests.chaos.fuzz --seed {asked.seed}", flush=True)
    forms = ("dedicated", "queued")
    started = time.monotonic()
    done: Counter[str] = Counter()
    failures: dict[str, Failure] = {}
    concerned: dict[str, set[str]] = {}
    for turn, form in enumerate(forms, 1):
        fuzz = Fuzz(form, f"{asked.seed}/{form}", started + asked.seconds * turn / len(forms))
        fuzz.run()
        done.update(fuzz.answers)
        failures.update(fuzz.failures)
        for kind, calls in fuzz.concerned.items():
            concerned.setdefault(kind, set()).update(calls)
    for failure in failures.values():
        print(f"\nUNTYPED {failure.kind}\n  change: {failure.change}\n  answer: {failure.text}")
        print(f"  calls:  {', '.join(sorted(concerned.get(failure.kind, ())))}")
    print("\ncalls: " + ", ".join(f"{name} {count}" for name, count in done.most_common()))
    print(f"changed answers: {done.total():,} of {len(done)} calls")
    print(f"untyped: {len(failures)} kinds; {time.monotonic() - started:.0f} s, seed {asked.seed}", flush=True)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
