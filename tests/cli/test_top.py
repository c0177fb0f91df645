"""``loops top``: the figures of what runs, once and live."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

import loops_sync
from loops_async import AdamParams, ApiError, SamplingParams
from loops_async._http.settings import resolve_settings
from loops_async._session.runtime import Runtime
from loops_async.cli import top
from loops_async.cli.running import Entry
from loops_local import LocalService
from tests.cli.conftest import COMMAND, Cli
from tests.support.patience import PATIENCE_SECONDS
from tests.support.work import example


@pytest.fixture(scope="module")
def trained(local: LocalService) -> Iterator[tuple[str, str, float]]:
    """A run that was trained for a step, with its loss, and a sampler that answered."""
    with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="leave") as service:
        trainer = service.create_lora_training_client("top-model", name="of-top")
        step = trainer.forward_backward([example()])
        trainer.optim_step(AdamParams()).result()
        sampler = service.create_sampling_client("top-model")
        sampler.sample([1, 2], sampling_params=SamplingParams(max_tokens=2))
        yield trainer.run_id, str(sampler.sampler_id), step.result().loss


def test_what_runs_is_shown_with_its_figures(
    cli: Cli, trained: tuple[str, str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top, "WINDOW", timedelta(hours=1))  # however slow this machine is
    run, sampler, loss = trained
    rows = {row["id"]: row for row in cli.json("top", "--once")}
    assert rows[run]["requests_per_second"] > 0
    assert rows[run]["p95_ms"] > 0
    assert (rows[run]["step"], rows[run]["loss"]) == (1, pytest.approx(loss))
    assert (rows[run]["kind"], rows[run]["status"], rows[sampler]["kind"]) == ("run", "RUNNING", "sampler")
    assert rows[sampler]["loss"] is None

    head, *lines = cli("top").splitlines()
    assert head.split()[:7] == ["id", "kind", "status", "requests/s", "p95", "loss", "step"]
    [shown] = [line for line in lines if line.startswith(run)]
    assert f"{loss:.4g}" in shown
    assert {run, sampler} <= set(cli("top", "-q").splitlines())


@pytest.fixture
def client(local: LocalService) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a terminal of its own; its output is read from its `stdout`."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    environment = {"LOOPS_BASE_URL": local.base_url, "BASETEN_API_KEY": local.api_key, "TERM": "xterm-256color"}
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [*COMMAND, "top"], stdin=slave, stdout=slave, stderr=slave, env=kept | environment, start_new_session=True
    )
    os.close(slave)
    process.stdout = os.fdopen(master, "rb", buffering=0)
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_it_is_live_in_a_terminal_until_it_is_interrupted(
    trained: tuple[str, str, float], client: subprocess.Popen[bytes]
) -> None:
    assert client.stdout is not None
    shown = b""
    while trained[0].encode() not in shown or b"Ctrl-C ends" not in shown:
        shown += client.stdout.read(65536)
    client.send_signal(signal.SIGINT)
    try:
        while client.stdout.read(65536):
            pass
    except OSError:  # Linux says so at the end
        pass
    assert client.wait(PATIENCE_SECONDS) == 130
    assert b"requests/s" in shown


class Silent:
    """A service that tells neither figures nor losses."""

    async def get_deployment_metrics(self, *_: Any, **__: Any) -> Any:
        raise ApiError("not offered", status=501)

    async def get_capabilities(self) -> Any:
        raise ApiError("not offered", status=501)


def test_what_a_service_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        Entry(
            id=id_,
            kind="run",
            model="m",
            name=None,
            status=None,
            created_at=datetime.now(UTC),
            age_seconds=1.0,
            deployment_id=d,
        )
        for id_, d in (("a", "d1"), ("b", None))
    ]

    async def running(*_: Any, **__: Any) -> list[Entry]:
        return entries

    monkeypatch.setattr(top, "running", running)
    runtime: Any = SimpleNamespace(control_plane=Silent())
    context: Any = None

    async def rows() -> list[top.Row]:
        tells_losses = await top._tells_losses(runtime.control_plane)
        return await top._rows(context, runtime, tells_losses=tells_losses, everyone=False)

    assert [(row.id, row.requests_per_second, row.p95_ms, row.loss) for row in asyncio.run(rows())] == [
        ("a", None, None, None),
        ("b", None, None, None),
    ]


async def test_losses_that_cannot_be_read_are_unknown(local: LocalService) -> None:
    runtime = Runtime(resolve_settings(base_url=f"{local.base_url}/elsewhere", api_key=local.api_key))
    try:
        assert await top._figures(runtime) == {}
    finally:
        await runtime.close()


def test_times_in_words() -> None:
    assert [top._time_in_words(ms) for ms in (None, 12.4, 1500.0)] == [None, "12 ms", "1.5 s"]
