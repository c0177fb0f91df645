"""What the dashboard shows, gathered from the parts of the service. Times are in seconds since 1970."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct

from .._execution.models import ModelHost
from .._execution.operations import Operations, UnfinishedOperation
from .._resources.activity import SLICE_SECONDS, Activity, Slice
from .._resources.history import Curve
from .._resources.metrics import resident_bytes
from .._resources.registry import Registry, Sampler
from .._resources.run import Run
from .._storage.records import CheckpointRecord
from ..faults import Faults, PlannedFault

__all__ = ["DashboardData", "Gatherer", "ServiceFacts"]

_MOST: Final = 50
"""The operations, checkpoints and lines of the log that are sent."""
_MINUTE: Final = 60.0
_HIDDEN: Final = "[REDACTED]"


class ServiceFacts(Struct, frozen=True, kw_only=True):
    """What does not change while the service runs."""

    engine: str
    version: str
    started_at: float


class _Model(Struct, frozen=True, kw_only=True):
    name: str
    loaded: bool
    running: int
    waiting: int
    cache_bytes: int


class _Samples(Struct, frozen=True, kw_only=True):
    """The calls of `sample` in the last minute; percentiles in seconds."""

    per_second: float
    p50: float | None
    p95: float | None
    under_way: int


class _Row(Struct, frozen=True, kw_only=True):
    """A run in the list of all; `loss` and `last_loss` are null where they are not a number."""

    id: str
    name: str | None
    model: str
    rank: int
    status: str
    active: bool
    local: bool
    step: int
    version: int | None
    loss: Sequence[float | None]
    last_loss: float | None
    tokens_per_second: float | None
    created_at: float
    used_at: float | None


class _Line(Struct, frozen=True, kw_only=True):
    """A curve: points ``(step, value)``, and the newest value; null where it is not a number."""

    name: str
    points: Sequence[tuple[int, float | None]]
    last: float | None


class _Detail(Struct, frozen=True, kw_only=True):
    """All that is known of one run; `own` are the curves of `TrainingClient.log`."""

    row: _Row
    curves: list[_Line]
    own: list[_Line]
    versions: list[tuple[int, str]]


class _SamplerRow(Struct, frozen=True, kw_only=True):
    id: str
    of: str
    run_id: str | None
    model: str
    status: str
    version: int | None
    used_at: float | None


class _Work(Struct, frozen=True, kw_only=True):
    """Calls of `sample` and operations under way; completions and operations that wait; the operations among them."""

    under_way: int
    waiting: int
    operations_under_way: int
    operations_waiting: int
    operations: list[UnfinishedOperation]


class _CheckpointRow(Struct, frozen=True, kw_only=True):
    path: str
    kind: str
    model: str
    rank: int
    size_bytes: int
    created_at: float
    expires_at: float | None


class _Checkpoints(Struct, frozen=True, kw_only=True):
    count: int
    size_bytes: int
    newest: list[_CheckpointRow]


class _LogLine(Struct, frozen=True, kw_only=True):
    time: float
    level: str
    about: str
    message: str


class DashboardData(Struct, frozen=True, kw_only=True):
    """The body of the answer; `run` is the one that was asked for."""

    now: float
    address: str
    service: ServiceFacts
    models: list[_Model]
    memory: int | None
    samples: _Samples
    slice_seconds: float
    slices: list[Slice]
    runs: list[_Row]
    samplers: list[_SamplerRow]
    work: _Work
    checkpoints: _Checkpoints
    faults: list[PlannedFault]
    log: list[_LogLine]
    run: _Detail | None


class Gatherer:
    """Gathers the data; `secrets` are taken out of the lines of the log."""

    def __init__(
        self,
        facts: ServiceFacts,
        registry: Registry,
        operations: Operations,
        activity: Activity,
        faults: Faults,
        *,
        secrets: Sequence[str],
    ) -> None:
        self._facts = facts
        self._registry = registry
        self._operations = operations
        self._activity = activity
        self._faults = faults
        self._secrets = secrets

    def measure(self) -> None:
        """End a slice of the figures over time."""
        self._activity.measure(*self._work_counts())

    async def data(self, address: str, run_id: str | None = None) -> DashboardData:
        """Return everything, with the details of one run; `address` is that by which the service was asked."""
        run = None if run_id is None else self._registry.find_run(run_id)
        checkpoints = await self._registry.checkpoints.select()
        return DashboardData(
            now=time.time(),
            address=address,
            service=self._facts,
            models=[_model(host) for host in self._registry.models.hosts],
            memory=resident_bytes(),
            samples=self._samples(),
            slice_seconds=SLICE_SECONDS,
            slices=list(self._activity.slices),
            runs=[_row(each) for each in self._registry.all_runs()],
            samplers=[_sampler_row(each) for each in self._registry.samplers()],
            work=self._work(),
            checkpoints=_checkpoints(checkpoints),
            faults=self._faults.in_force,
            log=self._log(),
            run=None if run is None else _detail(run),
        )

    def _samples(self) -> _Samples:
        latency = self._activity.latency(_MINUTE)
        return _Samples(
            per_second=self._activity.samples_per_second(_MINUTE),
            p50=latency.p50,
            p95=latency.p95,
            under_way=self._activity.samples_under_way,
        )

    def _work(self) -> _Work:
        under_way, waiting = self._work_counts()
        operations_under_way, operations_waiting = self._operations.counts
        return _Work(
            under_way=under_way,
            waiting=waiting,
            operations_under_way=operations_under_way,
            operations_waiting=operations_waiting,
            operations=self._operations.oldest(_MOST),
        )

    def _work_counts(self) -> tuple[int, int]:
        started, waiting = self._operations.counts
        completions = sum(host.usage.waiting for host in self._registry.models.hosts)
        return self._activity.samples_under_way + started, completions + waiting

    def _log(self) -> list[_LogLine]:
        lines = self._registry.logs.latest[-_MOST:]
        about = self._names_of_deployments({deployment_id for deployment_id, _ in lines}) if lines else {}
        return [
            _LogLine(
                time=int(line.timestamp) / 1e9,
                level=line.level or "",
                about=about.get(deployment_id, deployment_id),
                message=self._without_secrets(line.message),
            )
            for deployment_id, line in reversed(lines)
        ]

    def _names_of_deployments(self, ids: set[str]) -> dict[str, str]:
        """Return the run or sampler on each deployment."""
        runs = {run.record.deployment_id: f"run {run.record.id}" for run in reversed(self._registry.all_runs())}
        samplers = {each.record.deployment_id: f"sampler {each.record.id}" for each in self._registry.samplers()}
        return {id_: name for id_, name in (runs | samplers).items() if id_ in ids}

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, _HIDDEN)
        return text


def _model(host: ModelHost) -> _Model:
    usage = host.usage
    return _Model(
        name=host.name,
        loaded=host.is_loaded,
        running=usage.running,
        waiting=usage.waiting,
        cache_bytes=usage.cache_bytes + usage.prefix_bytes,
    )


def _row(run: Run) -> _Row:
    record, history = run.record, run.history
    loss = history.curves["loss"]
    return _Row(
        id=record.id,
        name=record.name,
        model=record.base_model,
        rank=record.lora_rank,
        status=run.deployment.status if record.active else "INACTIVE",
        active=record.active,
        local=record.local,
        step=run.step,
        version=run.published_version,
        loss=loss.outline,
        last_loss=loss.last,
        tokens_per_second=history.tokens_per_second,
        created_at=record.created_at.timestamp(),
        used_at=history.used_at,
    )


def _detail(run: Run) -> _Detail:
    history = run.history
    return _Detail(
        row=_row(run),
        curves=_lines(history.curves.items()),
        own=_lines(sorted(history.own.items())),
        versions=list(history.versions),
    )


def _lines(curves: Iterable[tuple[str, Curve]]) -> list[_Line]:
    return [_Line(name=name, points=curve.points, last=curve.last) for name, curve in curves]


def _sampler_row(sampler: Sampler) -> _SamplerRow:
    record, run = sampler.record, sampler.run
    return _SamplerRow(
        id=record.id,
        of="base model" if run is None and record.model_path is None else record.model_path or f"run {record.run_id}",
        run_id=record.run_id,
        model=record.base_model,
        status=sampler.deployment.status,
        version=None if run is None else run.published_version,
        used_at=sampler.deployment.used_at,
    )


def _checkpoints(records: Sequence[CheckpointRecord]) -> _Checkpoints:
    return _Checkpoints(
        count=len(records),
        size_bytes=sum(record.size_bytes for record in records),
        newest=[_checkpoint_row(record) for record in reversed(records[-_MOST:])],
    )


def _checkpoint_row(record: CheckpointRecord) -> _CheckpointRow:
    return _CheckpointRow(
        path=str(record.uri),
        kind="training state" if record.target == "trainer" else "sampler weights",
        model=record.base_model,
        rank=record.rank,
        size_bytes=record.size_bytes,
        created_at=record.created_at.timestamp(),
        expires_at=None if record.expires_at is None else record.expires_at.timestamp(),
    )
