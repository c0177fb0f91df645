"""Change the answers of every route, and look for errors that no caller could expect.

Anything that a call raises must be a `LoopsError`, or an `OSError` of a download; must be picklable and bounded, and
must not show the key. What is not is printed with its smallest input. Exits with 1 when there is any.
"""

from __future__ import annotations

import argparse
import asyncio
import pickle
import random
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

from .answers import Mutation, mutations
from .calls import CALLS, Call, Lane, outcome
from .unseen import unseen_errors

LANES: Final = 64
EXAMPLES_OF_A_ROUND: Final = 20
LONGEST_ERROR: Final = 20_000
ALWAYS: Final = 1_000_000


class Case(Struct, frozen=True):
    """One call, what is changed in the answers of its route, and in how many of them."""

    call: Call
    changes: tuple[Mutation, ...]
    times: int

    def __str__(self) -> str:
        changes = ", ".join(f"{change!r:.200}" for change in self.changes)
        return f"{self.call.name} with {self.call.route}: {changes}, {'always' if self.times == ALWAYS else 'once'}"


class Failure(NamedTuple):
    """A case that went wrong: `kind` is equal for failures with the same cause."""

    kind: str
    case: Case
    text: str


class FoundError(Exception):
    """Tells hypothesis that there is something to make smaller."""


def cases_of(form: str) -> st.SearchStrategy[Case]:
    """Return the cases for a form of the service."""
    calls = [call for call in CALLS if call.only in ("", form)]
    times = st.sampled_from((1, 1, 1, ALWAYS))
    changes = st.lists(mutations, min_size=1, max_size=3).map(tuple)
    return st.builds(Case, st.sampled_from(calls), changes, times)


class Fuzz:
    """Runs cases, as many at once as there are lanes, and keeps the smallest case of each kind of failure."""

    def __init__(self, form: str, seed: str, until: float) -> None:
        self._form = form
        self._seed = seed
        self._until = until
        self._runner = asyncio.Runner()
        self._lanes: list[Lane] = []
        self._stack = AsyncExitStack()
        self.cases: Counter[str] = Counter()
        self.failures: dict[str, Failure] = {}

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self._until

    def run(self) -> None:
        """Run rounds until the time is over."""
        with self._runner:
            self._runner.run(self._open())
            number = 0
            while not self.is_over:
                number += 1
                self._round(number)
            self._runner.run(self._stack.aclose())

    def _round(self, number: int) -> None:
        """Let hypothesis draw cases; it makes the first new failure smaller, and the next round goes on."""
        known = set(self.failures)
        cases = cases_of(self._form)

        @hypothesis_seed(f"{self._seed}/{number}")
        @settings(
            max_examples=EXAMPLES_OF_A_ROUND,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        # None first, since hypothesis makes towards it what is not needed for the failure.
        @given(st.lists(st.none() | cases | cases | cases, min_size=LANES, max_size=LANES))
        def batch(drawn: list[Case | None]) -> None:
            chosen = [case for case in drawn if case is not None]
            if self.is_over or not chosen:
                return
            failures = self._runner.run(self._batch(chosen))
            for failure in failures:
                smallest = self.failures.get(failure.kind)
                if smallest is None or len(str(failure.case)) < len(str(smallest.case)):
                    self.failures[failure.kind] = failure
            if any(failure.kind not in known for failure in failures):
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
        self._lanes = [Lane(local) for _ in range(LANES)]
        for lane in self._lanes:
            await lane.open()
            self._stack.push_async_callback(lane.close)

    async def _batch(self, cases: list[Case]) -> list[Failure]:
        with unseen_errors() as unseen:
            found = await asyncio.gather(*map(self._case, self._lanes, cases))
        failures = [failure for failure in found if failure is not None]
        # Whose it is cannot be said: the first one's, until the batch has become small.
        return failures + [Failure(f"unseen: {line[:80]}", cases[0], line) for line in unseen]

    async def _case(self, lane: Lane, case: Case) -> Failure | None:
        lane.change.begin(case.call.route, list(case.changes), times=case.times)
        error = await outcome(lane, case.call)
        self.cases[case.call.name] += 1
        lane.change.times = 0
        answers = " | ".join(lane.change.seen[:3])
        if error is not None and case.call.breaks:
            await lane.renew()
        problem = None if error is None else _problem(error, case.call, lane.secret)
        return None if problem is None else Failure(f"{case.call.name}: {problem}", case, answers)


def _problem(error: BaseException, call: Call, secret: str) -> str | None:
    """Return what is wrong with an error, if anything is."""
    if not isinstance(error, loops.LoopsError):
        if isinstance(error, OSError) and call.name == "download_checkpoint":
            return None
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
    text = str(error)
    if len(text) > LONGEST_ERROR:
        return f"{type(error).__name__} with a text of {len(text)} characters"
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
    for turn, form in enumerate(forms, 1):
        fuzz = Fuzz(form, f"{asked.seed}/{form}", started + asked.seconds * turn / len(forms))
        fuzz.run()
        done.update(fuzz.cases)
        failures.update(fuzz.failures)
    for failure in failures.values():
        print(f"\nUNTYPED {failure.kind}\n  input:  {failure.case}\n  answer: {failure.text}")
    print("\ncalls: " + ", ".join(f"{name} {count}" for name, count in done.most_common()))
    print(f"changed answers: {done.total():,} in {len(done)} calls of {len({call.name for call in CALLS})}")
    print(f"untyped: {len(failures)} kinds; {time.monotonic() - started:.0f} s, seed {asked.seed}", flush=True)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
