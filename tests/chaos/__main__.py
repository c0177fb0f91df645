"""Run complete programs under schedules of faults, and compare what they saw with what the service executed.

Runs in both colours, on a dedicated and on a queued service, and some with the torch engine, whose final weights must
equal those of an undisturbed run bit for bit. Exits with 1 when anything is lost, doubled, paid twice, wrong, hung,
untyped or left over.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Struct, field

from tests.support.colours import Async, Blocking

from .leftovers import holdings, left_over
from .program import SAMPLES_AT_ONCE, Report
from .run import MUST_BE_ZERO, SETTINGS, Finding, Setting, Verdict, plan_of, run
from .unseen import unseen_errors

SCHEDULES: Final = 200
AT_ONCE: Final = 10
LAST_SECONDS: Final = 2.0
"""For connections that were being made while the servers closed: these are the servers', and no client's."""
LINES_OF_A_KIND: Final = 3
"""How many findings of one kind in one schedule are printed."""


class Job(NamedTuple):
    """One schedule of one setting."""

    setting: Setting
    number: int

    def __str__(self) -> str:
        return f'--only "{self.setting}" --schedule {self.number}'


class Tally(Struct):
    """What the schedules of one setting came to."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    given_up: Counter[str] = field(default_factory=Counter)

    def add(self, verdict: Verdict) -> None:
        """Add a schedule."""
        self.faults.update(verdict.faults)
        self.given_up.update(verdict.report.given_up)
        self.counts.update(
            {
                "schedules": 1,
                "faults": sum(verdict.faults.values()),
                "operations": verdict.report.operations,
                "complete": int(verdict.report.is_complete),
                "given up": sum(verdict.report.given_up.values()),
            }
        )
        for finding in verdict.findings:
            self.counts[finding.kind] += finding.times


class Chaos:
    """Runs schedules, some at once, and keeps a tally of each setting."""

    def __init__(self, seed: int, settings: Sequence[Setting], *, explain: bool) -> None:
        self._seed = seed
        self._explain = explain
        self._references: dict[Setting, Report] = {}
        self._before: Counter[str] = Counter()
        self.tallies = {setting: Tally() for setting in settings}

    def prepare(self) -> None:
        """Run each setting undisturbed: what the others must equal, and the first use of everything."""
        with unseen_errors():  # what libraries warn of when they are imported
            verdicts = self._run([Job(setting, 0) for setting in self.tallies], disturbed=False)
        for setting, verdict in zip(self.tallies, verdicts, strict=True):
            if verdict.findings or not verdict.report.is_complete:
                raise SystemExit(f"{setting} fails without any fault: {verdict}")
            self._references[setting] = verdict.report
        self._before = holdings()

    def batch(self, jobs: Sequence[Job]) -> None:
        """Run schedules at once, print what must not be, and look at what is left over when all have ended."""
        with unseen_errors() as logged:
            verdicts = self._run(jobs, disturbed=True)
            rest = left_over(self._before)
        self._before += rest
        shared = [Finding("left over", thing, times) for thing, times in rest.items()]
        shared += [Finding("untyped", line) for line in logged]
        # Nobody can tell which schedule of the batch it was: it is counted for the first.
        verdicts[0].findings.extend(shared)
        for job, verdict in zip(jobs, verdicts, strict=True):
            self.tallies[job.setting].add(verdict)
            _print_findings(job, verdict)
            if self._explain:
                self._print_story(job, verdict)

    def _seed_of(self, job: Job) -> str:
        return f"{self._seed}/{job.setting}/{job.number}"

    def _print_story(self, job: Job, verdict: Verdict) -> None:
        for fault in plan_of(job.setting, self._seed_of(job)):
            print(f"planned: {msgspec.json.encode(fault).decode():.300}")
        for text in verdict.report.named:
            print(f"error: {text:.500}")

    def _run(self, jobs: Sequence[Job], *, disturbed: bool) -> list[Verdict]:
        threads = ThreadPoolExecutor(len(jobs) * (SAMPLES_AT_ONCE + 2), "blocking")
        colours = {"async": Async(), "blocking": Blocking(threads)}

        async def run_job(job: Job) -> Verdict:
            seed = self._seed_of(job)
            plan = plan_of(job.setting, seed) if disturbed else []
            reference = self._references.get(job.setting)
            return await run(job.setting, colours[job.setting.colour], plan, seed, reference)

        async def run_all() -> list[Verdict]:
            verdicts = await asyncio.gather(*map(run_job, jobs))
            await asyncio.sleep(LAST_SECONDS)
            return verdicts

        verdicts = asyncio.run(run_all())
        hung = any(finding.kind == "hung" for verdict in verdicts for finding in verdict.findings)
        threads.shutdown(wait=not hung, cancel_futures=hung)
        return verdicts


def main() -> int:
    """Run what the command line asks for, and print the table; return the exit code."""
    given = _arguments()
    settings = [setting for setting in SETTINGS if given.only in str(setting)]
    started = time.monotonic()
    print(f"chaos: seed {given.seed}; again with: python -m tests.chaos --seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        tempfile.tempdir = scratch  # what a service or a download forgets is found there
        chaos = Chaos(given.seed, settings, explain=given.schedule is not None)
        chaos.prepare()
        libraries = set(Path(scratch).iterdir())
        for jobs in _batches(settings, given):
            if given.seconds is not None and time.monotonic() - started > given.seconds:
                break
            chaos.batch(jobs)
            _print_progress(chaos, started)
        tempfile.tempdir = None
        forgotten = sorted(path.name for path in set(Path(scratch).iterdir()) - libraries)
    failed = _print_table(chaos, forgotten)
    print(f"{time.monotonic() - started:.0f} s, seed {given.seed}: {'FAILED' if failed else 'ok'}", flush=True)
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="default: a new one")
    parser.add_argument("--schedules", type=int, default=SCHEDULES, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, help="begin no schedule after this time")
    parser.add_argument("--only", default="", help="settings whose names contain this, e.g. 'async queued'")
    parser.add_argument("--schedule", type=int, help="only the schedule of this number, with its faults and errors")
    return parser.parse_args()


def _batches(settings: Sequence[Setting], given: argparse.Namespace) -> Iterator[Sequence[Job]]:
    """Yield the schedules, those of all settings mixed, as many as run at once."""
    if given.schedule is not None:
        yield [Job(setting, given.schedule) for setting in settings]
        return
    shares = [setting for setting in settings for _ in range(setting.share)]
    random.Random(given.seed).shuffle(shares)
    numbers: Counter[Setting] = Counter()
    jobs = []
    for index in range(given.schedules):
        setting = shares[index % len(shares)]
        numbers[setting] += 1
        jobs.append(Job(setting, numbers[setting]))
    for first in range(0, len(jobs), AT_ONCE):
        yield jobs[first : first + AT_ONCE]


def _print_findings(job: Job, verdict: Verdict) -> None:
    printed: Counter[str] = Counter()
    for finding in verdict.findings:
        printed[finding.kind] += 1
        if printed[finding.kind] <= LINES_OF_A_KIND:
            print(f"{finding.kind.upper()}: {job}: {finding.text}", flush=True)
    for kind, count in printed.items():
        if count > LINES_OF_A_KIND:
            print(f"{kind.upper()}: {job}: and {count - LINES_OF_A_KIND} more", flush=True)


def _print_progress(chaos: Chaos, started: float) -> None:
    total: Counter[str] = Counter()
    for tally in chaos.tallies.values():
        total.update(tally.counts)
    bad = {kind: total[kind] for kind in MUST_BE_ZERO if total[kind]}
    print(f"{time.monotonic() - started:4.0f} s: {total['schedules']} schedules, {total['faults']} faults {bad or ''}")


def _print_table(chaos: Chaos, forgotten: Sequence[str]) -> bool:
    """Print what all came to; return whether anything is that must not be."""
    columns: dict[str, Counter[str]] = {str(setting): tally.counts for setting, tally in chaos.tallies.items()}
    total: Counter[str] = Counter()
    for counts in columns.values():
        total.update(counts)
    total["left over"] += len(forgotten)
    columns["all"] = total
    print("\n" + " " * 12 + "".join(f"{name:>20}" for name in columns))
    for row in ("schedules", "complete", "faults", "operations", "given up", *MUST_BE_ZERO):
        print(f"{row:12}" + "".join(f"{counts[row]:>20,}" for counts in columns.values()))
    _print_sums("faults", [tally.faults for tally in chaos.tallies.values()])
    _print_sums("given up, as errors said", [tally.given_up for tally in chaos.tallies.values()])
    if forgotten:
        print(f"LEFT OVER in the temporary directory: {', '.join(forgotten[:20])}")
    return any(total[kind] for kind in MUST_BE_ZERO)


def _print_sums(title: str, counters: Sequence[Counter[Any]]) -> None:
    total: Counter[Any] = sum(counters, Counter())
    print(f"{title}: " + (", ".join(f"{name} {count}" for name, count in total.most_common()) or "none"))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # A call that hung holds a thread that never ends.
    os._exit(code)
