"""Kill programs that have a journal at random moments and start them again, until they end; compare what was done.

A training loop and a loop of rollouts, in processes of their own, on the embedded service with a model that really
trains. Their final weights must be those of an undisturbed program bit for bit, and each operation executed once.
Exits with 1 when anything is doubled, lost, wrong or left over.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct, field

import loops_async as loops
from loops_local import LocalService, serve_in_thread
from loops_local.engine import load_engine
from tests.support.warnings import WARNINGS

from .journaled import GROUPS, MEMBERS, MODEL, Seen, prompt, rate
from .ledger import CountingEngine, Ledger, Operation

STEPS: Final = {"training": 50, "rollouts": 16}
"""How many steps each loop does, which takes about a second."""
HUNG_SECONDS: Final = 120.0
MUST_BE_ZERO: Final = ("doubled", "lost", "wrong", "weights", "failed", "left over")


class Verdict(Struct):
    """What a program came to, after any number of kills; `seconds` is how long it took from its last start."""

    seen: Seen | None
    kills: int
    seconds: float
    findings: Counter[str] = field(default_factory=Counter)
    paid_again: int = 0


class Killer:
    """Runs programs on one service."""

    def __init__(self, local: LocalService, ledger: Ledger, folder: Path, chance: random.Random) -> None:
        self._local = local
        self._ledger = ledger
        self._folder = folder
        self._chance = chance
        self._count = 0

    def run(self, loop: str, reference: Verdict | None) -> Verdict:
        """Run a program to its end, and kill it on the way if there is a `reference`."""
        self._ledger.training.clear()
        self._ledger.samples.clear()
        self._count += 1
        journal = self._folder / f"{self._count}.journal"
        kills = 0
        while (said := self._start(loop, journal, None if reference is None else reference.seconds)) is None:
            kills += 1
        code, out, error, seconds = said
        verdict = Verdict(None, kills, seconds)
        if code:
            print(f"FAILED: {loop}, {journal.name}, after {kills} kills:\n{error}", flush=True)
            verdict.findings["failed"] += 1
            return verdict
        verdict.seen = msgspec.json.decode(out.splitlines()[-1], type=Seen)
        verdict.findings.update(self._judged(loop, verdict.seen, reference))
        needed = STEPS[loop] * GROUPS * MEMBERS if loop == "rollouts" else 0
        verdict.paid_again = self._ledger.samples.total() - needed
        return verdict

    def _start(self, loop: str, journal: Path, seconds: float | None) -> tuple[int, str, str, float] | None:
        """Start a program; return its end, or None if it was killed within so many seconds."""
        arguments = loop, self._local.base_url, str(self._local.api_key), str(journal), str(STEPS[loop])
        command = [sys.executable, *WARNINGS, "-m", "tests.chaos.journaled", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()  # what comes before it says that it is ready is not worth killing
            begun = time.monotonic()
            try:
                limit = HUNG_SECONDS if seconds is None else self._chance.uniform(0, seconds)
                out, error = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                return None
            return process.returncode, out, error, time.monotonic() - begun

    def _judged(self, loop: str, seen: Seen, reference: Verdict | None) -> Iterator[str]:
        executed = Counter(self._ledger.training)
        for operation in expected(loop):
            if executed[operation] != 1:
                yield "doubled" if executed[operation] else "lost"
        if executed.keys() - set(expected(loop)):
            yield "wrong"
        if list(dict.fromkeys(self._ledger.training)) != list(expected(loop)):
            yield "wrong"
        if reference is not None and reference.seen is not None:
            if seen.weights != reference.seen.weights:
                yield "weights"
            if seen.results != reference.seen.results:
                yield "wrong"
        for run_id in asyncio.run(_active_runs(self._local)) - {seen.run_id}:
            print(f"LEFT OVER: run {run_id}", flush=True)
            yield "left over"


def expected(loop: str) -> Iterator[Operation]:
    """Yield what a loop has the service execute, in order."""
    for step in range(STEPS[loop]):
        yield "forward_backward", step + 1 if loop == "training" else prompt(step * GROUPS)[0]
        yield "optim_step", rate(step)


async def _active_runs(local: LocalService) -> set[str]:
    """Return the runs that are active, and deactivate them: the next program has one of its own."""
    async with loops.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="leave") as service:
        runs = [run for run in await service.control_plane.list_runs() if run.status.name != "INACTIVE"]
        for run in runs:
            await service.control_plane.deactivate_run(run.id)
    return {run.id for run in runs}


def _counting_engine(ledger: Ledger, name: str) -> CountingEngine:
    return CountingEngine(load_engine("torch", name, cache_dir=Path(tempfile.gettempdir())), ledger)


def main() -> int:
    """Do what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.journal", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="default: a new one")
    given = parser.parse_args()
    print(f"journal: seed {given.seed}", flush=True)
    ledger, started = Ledger(), time.monotonic()
    totals = {loop: Counter[str]() for loop in STEPS}
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_in_thread(engine=partial(_counting_engine, ledger), model=MODEL, provisioning_seconds=0.0) as local,
    ):
        killer = Killer(local, ledger, Path(folder), random.Random(given.seed))
        for loop in STEPS:
            killer.run(loop, None)  # the first one is slower
        references = {loop: killer.run(loop, None) for loop in STEPS}
        if any(one.findings for one in references.values()):
            raise SystemExit(f"it fails without any kill: {references}")
        while sum(total["kills"] for total in totals.values()) < given.kills:
            loop = min(STEPS, key=lambda each: totals[each]["kills"])
            verdict = killer.run(loop, references[loop])
            done = {"programs": 1, "kills": verdict.kills, "samples paid again": verdict.paid_again}
            totals[loop].update(done, **verdict.findings)
            print(f"{time.monotonic() - started:4.0f} s: {loop}: {dict(totals[loop])}", flush=True)
    print(f"\n{'':20}" + "".join(f"{loop:>12}" for loop in STEPS))
    for row in ("programs", "kills", "samples paid again", *MUST_BE_ZERO):
        print(f"{row:20}" + "".join(f"{totals[loop][row]:>12}" for loop in STEPS))
    failed = any(total[row] for total in totals.values() for row in MUST_BE_ZERO)
    print(f"{time.monotonic() - started:.0f} s, seed {given.seed}: {'FAILED' if failed else 'ok'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
