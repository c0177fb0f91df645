"""One schedule: a service, a fault proxy before it, a program, and the judgement of what happened."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from msgspec import Struct, field

import loops_async as loops
from loops_local import FaultProxy, LocalService
from loops_local.engine import load_engine
from loops_local.faults import Fault
from tests.support.colours import Colour

from .ledger import CountingEngine, Ledger, Operation
from .program import Program, Report, Size, operations, prompt
from .schedules import schedule

HUNG_SECONDS: Final = 150.0
"""A program takes about ten seconds, and the longest patience of one call is a minute."""

MUST_BE_ZERO: Final = ("lost", "doubled", "paid twice", "wrong", "hung", "untyped", "left over")


class Setting(Struct, frozen=True):
    """A colour, a form of the service, and an engine. `share` of all schedules, in parts, are of this setting."""

    colour: str
    form: str
    engine: str = "echo"
    size: Size = Size()
    share: int = 4

    def __str__(self) -> str:
        return f"{self.colour} {self.form if self.engine == 'echo' else self.engine}"

    @property
    def model(self) -> str:
        return "tiny" if self.engine == "torch" else "echo"


_FEW_SAMPLES = Size(samples=20)

SETTINGS: Final = (
    *(Setting(colour, form) for colour in ("async", "blocking") for form in ("dedicated", "queued")),
    *(Setting(colour, "dedicated", "torch", _FEW_SAMPLES, share=1) for colour in ("async", "blocking")),
)


class Finding(Struct):
    """Something that must not be; `times` is how often."""

    kind: str
    text: str
    times: int = 1


class Verdict(Struct):
    """What a schedule came to."""

    report: Report
    faults: Mapping[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def plan_of(setting: Setting, seed: str) -> Sequence[Fault]:
    """Return the faults of a schedule."""
    return schedule(seed, queued=setting.form == "queued")


async def run(setting: Setting, colour: Colour, plan: Sequence[Fault], seed: str, reference: Report | None) -> Verdict:
    """Run a program under a plan of faults, and compare it with `reference`, the report of an undisturbed run."""
    ledger = Ledger()
    with tempfile.TemporaryDirectory() as directory:
        async with (
            LocalService(
                engine=partial(_counting_engine, setting.engine, ledger),
                model=setting.model,
                serverless=setting.form == "queued",
                provisioning_seconds=0.0,
                poll_hold_seconds=1.0,
            ) as local,
            FaultProxy(to=local.base_url, plan=plan, seed=random.Random(seed).randrange(2**32)) as proxy,
        ):
            program = Program(
                colour,
                base_url=proxy.base_url,
                api_key=local.api_key,
                model=setting.model,
                size=setting.size,
                directory=Path(directory),
            )
            running = asyncio.ensure_future(program.run())
            hung = await _is_hung(running, program.report)
            if hung:
                running.cancel()
                await asyncio.wait([running], timeout=10)
            active = await _active_runs(local)
    report = program.report
    findings = [*judged(report, ledger, setting.size), *runs_left_over(report, active)]
    if hung:
        findings.append(Finding("hung", f"for {HUNG_SECONDS:g} s after {list(report.results)[-1:]}"))
    if reference is not None:
        findings += wrong_results(report, reference, compare_samples=setting.engine == "echo")
    return Verdict(report, proxy.counts.faults, findings)


async def _is_hung(running: asyncio.Future[None], report: Report) -> bool:
    """Wait until a program ends, or no call of it has ended for `HUNG_SECONDS`, however slow the machine is."""
    while not running.done():
        ended = len(report.results)
        await asyncio.wait([running], timeout=HUNG_SECONDS)
        if not running.done() and len(report.results) == ended:
            return True
    return False


def _counting_engine(kind: str, ledger: Ledger, name: str) -> CountingEngine:
    return CountingEngine(load_engine(kind, name, cache_dir=Path(tempfile.gettempdir())), ledger)


async def _active_runs(local: LocalService) -> set[str]:
    async with loops.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        runs = await service.control_plane.list_runs()
    return {run.id for run in runs if run.status is None or run.status.name != "INACTIVE"}


def judged(report: Report, ledger: Ledger, size: Size) -> Iterator[Finding]:
    """Compare what a program saw with what the engine executed."""
    executed = Counter(ledger.training)
    expected: list[Operation] = []
    for step in range(size.steps):
        for operation in operations(step):
            expected.append(operation)
            name = f"{operation[0]} {step}"
            if name in report.results and not executed[operation]:
                yield Finding("lost", f"{name} was reported done and never executed")
            if executed[operation] > 1:
                yield Finding("doubled", f"{name} was executed {executed[operation]} times")
    order = list(dict.fromkeys(ledger.training))
    if order != expected[: len(order)]:
        yield Finding("wrong", f"the operations were executed in another order: {order}")
    for number in range(size.samples):
        name, times = f"sample {number}", ledger.samples[prompt(number)]
        if name in report.results and not times:
            yield Finding("lost", f"{name} was answered and never executed")
        if times > 1:
            yield Finding("paid twice", f"{name} was executed {times} times")
    yield from (Finding("lost", text) for text in report.lost)
    yield from (Finding("untyped", text) for text in report.untyped)


def runs_left_over(report: Report, active: set[str]) -> Iterator[Finding]:
    """Yield the runs that cost money and that no error names."""
    said = " ".join(report.named)
    for run_id in active - {report.run_id}:
        if run_id not in said:
            yield Finding("left over", f"run {run_id} is active, and no error names it")


def wrong_results(report: Report, reference: Report, *, compare_samples: bool) -> Iterator[Finding]:
    """Compare what the calls returned with what they return undisturbed."""
    for name, result in report.results.items():
        if name.startswith("sample ") and not compare_samples:
            continue
        if result != reference.results[name]:
            yield Finding("wrong", f"{name} is {result}, and {reference.results[name]} undisturbed")
