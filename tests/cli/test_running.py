"""``loops ps`` and ``loops down``: what runs, and how it is stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

import loops_sync
from loops_async import ApiError, Deployment, DeploymentMetrics, MetricPoint, Run, Sampler
from loops_async.cli import _connection, running
from loops_local import LocalService, serve_in_thread
from tests.cli.conftest import Cli


@pytest.fixture
def some(local: LocalService) -> Iterator[Sequence[str]]:
    """The ids of a run, its sampler, and a standalone sampler."""
    with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="leave") as service:
        run = service.create_lora_training_client("echo", name="one").run
        assert run.sampler
        yield run.id, run.sampler.id, str(service.create_sampling_client("echo").sampler_id)


def test_what_runs_is_listed_until_it_is_stopped(cli: Cli, some: Sequence[str]) -> None:
    run, paired, sampler = some
    rows = {row["id"]: row for row in cli.json("ps")}
    assert (rows[run]["kind"], rows[run]["model"], rows[run]["name"]) == ("run", "echo", "one")
    assert (rows[run]["status"], rows[sampler]["kind"], rows[sampler]["status"]) == ("RUNNING", "sampler", "ACTIVE")
    assert 0 <= rows[run]["idle_seconds"] <= rows[run]["age_seconds"] + running.IDLE_STEP
    assert rows[sampler]["idle_seconds"] is None
    assert paired not in rows

    head, *lines = cli("ps", "--all").splitlines()
    assert head.split() == ["id", "kind", "status", "age", "idle", "model", "switches", "off", "name", "owner"]
    [shown] = [line.split() for line in lines if line.startswith(sampler)]
    assert shown[1:3] + shown[-5:] == ["sampler", "ACTIVE", "-", "echo", "-", "-", "-"]
    assert {run, sampler} <= set(cli("ps", "-q").splitlines())

    assert cli("down", run, sampler, run) == f"deactivated {run}, {sampler}\n"
    assert not {run, sampler} & set(cli("ps", "-q").splitlines())
    assert cli("down", run, "--quiet") == f"{run}\n"
    assert cli.json("down", sampler) == {"deactivated": [sampler]}


def test_what_cannot_be_stopped_is_said(cli: Cli, some: Sequence[str]) -> None:
    run, paired, _ = some
    assert cli("down", "nowhere", run, code=4) == f"deactivated {run}\n"
    assert "there is no sampler 'nowhere'" in cli.err
    assert "There is no run of this id either" in cli.err
    assert f"this sampler belongs to run '{run}'; deactivate the run" in cli.fails("down", paired, code=2)


@pytest.mark.parametrize("arguments", [[], ["some-id", "--all"]])
def test_it_must_be_said_what_to_stop(cli: Cli, arguments: Sequence[str]) -> None:
    cli("down", *arguments, code=2)
    assert "or --all" in cli.err


def test_all_of_it_is_stopped_only_when_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_in_thread(engine="echo", provisioning_seconds=0.0) as local:
        cli = Cli({"LOOPS_BASE_URL": local.base_url, "BASETEN_API_KEY": local.api_key})
        with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="leave") as service:
            run = service.create_lora_training_client("echo").run_id
            sampler = str(service.create_sampling_client("echo").sampler_id)
        assert "There is no terminal to ask in: give --yes, too." in cli.fails("down", "--all", code=2)
        monkeypatch.setattr(_connection, "_is_interactive", lambda: True)
        cli("down", "--all", given="n\n", code=1)
        assert f"Deactivate all 2: sampler {sampler} (echo), run {run} (echo)?" in cli.err
        assert cli("ps", "-q").split() == [sampler, run]
        assert cli("down", "--all", given="y\n").endswith(f"deactivated {sampler}, {run}\n")
        monkeypatch.undo()
        assert cli("down", "--all", "--yes") == ""
        assert cli.err == "none\n"
        assert json.loads(cli("ps", "--json")) == []


NOW = datetime.now(UTC)
OLD = NOW - timedelta(days=3)


def sampler(id_: str, status: str | None) -> Sampler:
    return Sampler(id=id_, base_url="http://s", base_model="m", created_at=OLD, status=running_status(status))


def running_status(name: str | None) -> Any:
    return type(Sampler(id="s", base_url="http://s", base_model="m", created_at=OLD).status)(name)


def run(id_: str, *, at: str, status: str | None = None, deployment_id: str | None = None) -> Run:
    return Run(
        id=id_,
        session_id="s",
        base_model="m",
        base_url=at,
        created_at=OLD,
        status=running_status(status),
        deployment_id=deployment_id,
        sampler=sampler(f"of-{id_}", "ACTIVE"),
    )


class Plane:
    """A service that tells little: an older one tells neither the status of a run nor its deployment."""

    async def list_runs(self, **_: Any) -> list[Run]:
        return [
            run("older", at="http://a"),
            run("older-failed", at="http://b"),
            run("newer", at="http://c", status="ACTIVE", deployment_id="dc"),
            run("newer-idle", at="http://d", status="ACTIVE", deployment_id="dd"),
            run("newer-ended", at="http://e", status="INACTIVE", deployment_id="de"),
            run("unknown", at="http://f", status="ODD"),
        ]

    async def list_samplers(self, **_: Any) -> list[Sampler]:
        states = ["ACTIVE", "SCALED_TO_ZERO", "UNHEALTHY", "INACTIVE", "BUILD_FAILED", None]
        return [sampler("of-older", "ACTIVE"), *(sampler(f"alone-{state}", state) for state in states)]

    async def list_deployments(self, **_: Any) -> list[Deployment]:
        states = {"a": "RUNNING", "b": "FAILED", "c": "RUNNING", "d": "SCALED_TO_ZERO", "e": "RUNNING"}
        return [
            Deployment(id=f"d{at}", base_model="m", base_url=f"http://{at}", status=running_status(state))
            for at, state in states.items()
        ]

    async def get_deployment_metrics(self, deployment_id: str, **_: Any) -> DeploymentMetrics:
        if deployment_id == "da":
            raise ApiError("not offered", status=501)
        last = NOW - timedelta(minutes=20 if deployment_id == "dc" else 600)
        points = [(last, 2.0), (NOW - timedelta(minutes=5), 0.0), (NOW - timedelta(minutes=4), None)]
        used = [MetricPoint(value=value, timestamp=at) for at, value in points if at > NOW - timedelta(hours=1)]
        return DeploymentMetrics(inference_volume=used)


async def test_what_a_service_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "datetime", SimpleNamespace(now=lambda _: NOW))
    plane: Any = Plane()
    context: Any = SimpleNamespace(obj=_connection.Connection(base_url="http://127.0.0.1:1"))
    rows = {row.id: row for row in await running.running(context, plane, everyone=True)}
    alone = {"alone-ACTIVE", "alone-SCALED_TO_ZERO", "alone-UNHEALTHY", "alone-None"}
    assert rows.keys() == alone | {"older", "newer", "newer-idle", "unknown"}
    shown = {id_: [str(running.COLUMNS[name](row)) for name in ("age", "idle")] for id_, row in rows.items()}
    assert shown["older"] == ["3.0 d", "None"]
    assert shown["newer"] == ["3.0 d", "19 min"]
    assert shown["newer-idle"] == ["3.0 d", "> 60 min"]
    assert {id_ for id_, row in rows.items() if row.switches_off} == {"newer-idle", "alone-SCALED_TO_ZERO"}


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5400, "1.5 h"), (200_000, "2.3 d")]
)
def test_lengths_of_time(seconds: float, words: str) -> None:
    assert running._in_words(seconds) == words
