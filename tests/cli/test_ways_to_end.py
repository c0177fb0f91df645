"""Errors are one paragraph and a code; interruptions leave nothing behind; what is missing is named."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer.main

import loops_sync
from loops_async import DeploymentMetrics, LogLine, MetricPoint
from loops_async.cli import _connection, _logs, _metrics, _show
from loops_async.cli._app import app
from loops_async.cli._show import plot
from loops_local import LocalService, serve_in_thread
from tests.cli.conftest import COMMAND, Cli
from tests.support.patience import PATIENCE_SECONDS


@pytest.fixture(scope="module")
def endless() -> Iterator[LocalService]:
    with serve_in_thread(engine="echo", provisioning_seconds=3600.0) as local:
        yield local


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["runs", "show", "nope"], 4, "there is no run 'nope'"),
        (["checkpoints", "list", "--run", "r", "--model", "m"], 2, "give only one of --run, --model, --path"),
        (["checkpoints", "download", "nope"], 4, "there is no checkpoint 'nope'"),
        (["checkpoints", "files", "bt://loops:r/weights/n"], 4, "no checkpoint bt://loops:r/weights/n"),
        (["checkpoints", "files", "bt://nonsense"], 2, "must be bt://loops:<run_id>/"),
        (["runs", "create", "echo", "--rank", "0"], 2, "Invalid value for '--rank'"),
        (["sample", "hi"], 2, "give exactly one of --sampler, --run, --checkpoint"),
        (["sample", "--run", "r", "hi", "--top-p", "2"], 2, "loops: --top-p: expected `float` <= 1.0; got 2.0"),
        (["--team", "nobody", "runs", "list"], 2, "there is no team 'nobody'"),
        (["--auth-scheme", "Basic", "runs", "list"], 2, "Invalid value for '--auth-scheme'"),
        (["runs", "show", ""], 2, "loops: RUN: must be a non-empty string"),
        (["runs", "create", "echo", "--name", "", "--no-wait"], 2, "'--name': must have 1 to 255 characters; got 0"),
        (["runs", "create", "echo", "--path", "bt://loops:r/sampler_weights/n"], 2, "'--path': must be a 'weights'"),
        (["runs", "logs", "r", "--since", "8d"], 2, "'--since': must be at most 7d; got '8d'"),
        (["runs", "logs", "r", "--level", "LOUD"], 2, "'--level': 'LOUD' is not one of"),
        (["runs", "lst"], 2, "No such command 'lst'. Did you mean 'list'?"),
        (["--base-url", "http://x.example/v1/loops/", "ps"], 2, "--base-url must not contain the path of the API"),
        (["--base-url", "http://x.example", "ps"], 2, "set LOOPS_ALLOW_HTTP=1"),
        (["--base-url", "ftp://x", "runs", "list"], 2, "--base-url must be an absolute http or https URL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_paragraph(cli: Cli, arguments: list[str], code: int, words: str) -> None:
    assert words in cli.fails(*arguments, code=code)


ESCAPES = "\x1b]0;title\x07\x1b[2J\u202e"
VISIBLE = r"\x1b]0;title\x07\x1b[2J\u202e"


def test_values_are_checked_before_anything_is_sent(cli: Cli, local: LocalService) -> None:
    asked = local.faults.watch("POST *", times=100), local.faults.watch("GET *", times=100)
    for command in (
        ("runs", "create", ""),
        ("runs", "create", "echo", "--name", "x" * 256),
        ("runs", "create", "echo", "--max-seq-len", "0"),
        ("runs", "create", "echo", "--ready-timeout", "0"),
        ("runs", "create", "echo", "--path", "bt://loops:r/sampler_weights/n"),
        ("samplers", "create"),
        ("samplers", "create", "--checkpoint", "bt://loops:r/weights/n"),
        ("samplers", "create", "echo", "--replicas", "0"),
        ("checkpoints", "list", "--run", "r", "--model", "m"),
        ("checkpoints", "list", "--path", "bt://nonsense"),
        ("checkpoints", "validate", "bt://loops:r/weights/n"),
        ("checkpoints", "deploy", "c", "--model-name", "", "--instance-type", "i", "--hf-secret", "s"),
        ("checkpoints", "download", "bt://nonsense"),
        ("runs", "metrics", "r", "--since", "0s"),
        ("capabilities", "--max-seq-len", "0"),
        ("sample", "--run", "r", "hi", "--max-tokens", "0"),
        ("sample", "--run", "r"),
        ("sample", "--run", "r", "hi", "--input", "prompts.jsonl"),
        ("sample", "--run", "r", "hi", "--output", "answers.jsonl"),
        ("sample", "--run", "r", "--input", "nowhere.jsonl"),
        ("down",),
    ):
        cli.fails(*command, code=2)
    assert asked == ([], [])
    local.faults.clear()


def test_control_characters_never_reach_a_terminal(cli: Cli, local: LocalService) -> None:
    with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
        run_id = service.create_lora_training_client("echo", name=ESCAPES).run_id
    assert VISIBLE in cli("runs", "show", run_id)
    assert VISIBLE in cli("runs", "list")
    printed = cli("runs", "show", run_id, "--json")
    assert not any(unseen in printed for unseen in ESCAPES if not unseen.isprintable())
    assert json.loads(printed)["name"] == ESCAPES


def test_nor_do_those_of_an_error(cli: Cli, local: LocalService) -> None:
    local.faults.answer("GET */runs", 400, {"error": ESCAPES})
    assert VISIBLE in cli.fails("runs", "list", code=2)


def test_text_is_escaped_in_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _show.show_text("a\n\x07\u202e")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _show.show_text("a\n\x07\u202e")
    assert capsys.readouterr().out == "a\n\x07\u202e\n" + r"a\n\x07\u202e".replace(r"\n", "\n") + "\n"


def test_a_wrong_key(cli: Cli) -> None:
    cli.environment["BASETEN_API_KEY"] = "none-of-the-keys"
    assert "Check the API key" in cli.fails("runs", "list", code=3)


def test_the_team_of_the_environment_counts_as_the_option(cli: Cli) -> None:
    cli.environment["LOOPS_TEAM"] = "nobody"
    for command in (("runs", "list"), ("samplers", "list"), ("runs", "create", "echo", "--no-wait")):
        assert "there is no team 'nobody'" in cli.fails(*command, code=2)


def test_no_service(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loops_async._http.retry.pause_before", lambda *_: 0.0)
    complaint = cli.fails("--base-url", "http://127.0.0.1:1", "runs", "list", code=6)
    assert "could not connect to 127.0.0.1:1" in complaint


def test_no_key_and_nobody_to_ask(cli: Cli) -> None:
    cli.environment |= {"BASETEN_API_KEY": "", "LOOPS_BASE_URL": ""}
    complaint = cli.fails("runs", "list", code=2)
    assert "no API key: set BASETEN_API_KEY" in complaint
    assert "api_key" not in complaint


def test_a_variable_is_named_where_it_is_wrong(cli: Cli) -> None:
    cli.environment["LOOPS_BASE_URL"] = "ftp://x"
    assert cli.fails("ps", code=2).startswith("loops: LOOPS_BASE_URL must be an absolute http or https URL")


def test_a_missing_key_is_asked_for(cli: Cli, local: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_connection, "_is_interactive", lambda: True)
    cli.environment["BASETEN_API_KEY"] = ""
    assert json.loads(cli("capabilities", "--json", given=f"{local.api_key}\n"))
    assert "API key" in cli.err
    assert local.api_key not in cli.err


def test_a_full_disk(cli: Cli, trained: tuple[str, str], tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("not a directory")
    _, path = trained
    assert "must be a directory" in cli.fails("checkpoints", "download", path, "--to", str(place), code=2)
    assert "Not a directory" in cli.fails("checkpoints", "download", path, "--to", str(place / "below"), code=1)


def test_a_mistake_of_ours_asks_to_be_reported(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("loops_async.control_plane.ControlPlane.list_runs", fail)
    assert "ZeroDivisionError: oops. This should not happen" in cli.fails("runs", "list", code=1)


def test_every_command_speaks_json() -> None:
    def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from commands(command, f"{path}{name} ")
            else:
                yield f"{path}{name}", command

    found = dict(commands(typer.main.get_command(app), ""))
    assert len(found) > 20
    silent = {
        name for name, command in found.items() if not any("--json" in parameter.opts for parameter in command.params)
    }
    assert silent == {"local serve", "completion"}
    assert all(command.help for command in found.values())


IN_THE_BACKGROUND = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
"""How a shell starts what a script does not wait for."""


@pytest.mark.parametrize(
    ("model", "number", "shell"),
    [
        ("interrupted", signal.SIGINT, ()),
        ("terminated", signal.SIGTERM, ()),
        ("terminated-in-the-background", signal.SIGTERM, IN_THE_BACKGROUND),
    ],
)
def test_an_interrupted_creation_leaves_no_run(
    endless: LocalService, model: str, number: signal.Signals, shell: Sequence[str]
) -> None:
    environment = os.environ | {"LOOPS_BASE_URL": endless.base_url, "BASETEN_API_KEY": endless.api_key}
    creating = subprocess.Popen(
        [*shell, *COMMAND, "runs", "create", model],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with creating:
        assert creating.stderr is not None
        assert any("CREATED" in line for line in iter(creating.stderr.readline, ""))
        creating.send_signal(number)
        _, rest = creating.communicate(timeout=PATIENCE_SECONDS)
    assert creating.returncode == 130
    assert "deactivated" in rest
    assert rest.endswith("loops: interrupted\n")
    with loops_sync.ServiceClient(base_url=endless.base_url, api_key=endless.api_key) as service:
        assert [run.status.name for run in service.control_plane.list_runs(base_model=model)] == ["INACTIVE"]


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_package_is_named(missing: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; from loops_async.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == f"loops: the command line needs {missing}: pip install 'loops-async[cli]'\n"


def test_the_service_on_this_machine(tmp_path: Path) -> None:
    serving = subprocess.Popen(
        [*COMMAND, "local", "serve", "--engine", "echo", "--port", "0", "--data-dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with serving:
        assert serving.stdout is not None
        assert "Loops is running at http://127.0.0.1:" in serving.stdout.readline()
        serving.send_signal(signal.SIGINT)
        serving.communicate(timeout=PATIENCE_SECONDS)
    assert serving.returncode == 0
    asking = [*COMMAND, "--base-url", "http://127.0.0.1:1", "local", "dashboard", "--data-dir", str(tmp_path), "--json"]
    ended = subprocess.run(asking, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "no service answers at http://127.0.0.1:1" in ended.stderr
    wrong = subprocess.run([*COMMAND, "local", "serve", "--engine", "steam"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "invalid choice: 'steam'" in wrong.stderr


def line(nanoseconds: int, message: str) -> LogLine:
    return LogLine(timestamp=str(nanoseconds), message=message)


async def test_following_a_log_shows_each_line_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_logs, "FOLLOW_SECONDS", 0.0)
    log = [line(1_000_000, "a"), line(1_000_001, "b"), line(1_500_000, "c"), line(7_000_000, "d")]
    shown_so_far = iter([2, 2, 3, 4])

    class Plane:
        async def get_deployment_logs(self, _: str, *, start_epoch_millis: int, **__: Any) -> list[LogLine]:
            available = log[: next(shown_so_far)]
            return [each for each in available if int(each.timestamp) >= start_epoch_millis * 1_000_000]

    plane: Any = Plane()
    new = _logs.new_lines(plane, "d", log[:1], None)
    assert [(await anext(new)).message for _ in range(3)] == ["b", "c", "d"]


def test_plots() -> None:
    def drawn(values: list[float], *, width: int, height: int = 1) -> list[str]:
        return plot(list(enumerate(values)), start=0, end=len(values), width=width, height=height)

    assert drawn([0, 1, 2, 3, 4], width=5) == ["▁▂▄▆█"]
    assert drawn([1, 2], width=2, height=2) == [" █", "██"]
    assert drawn([0.0, 0.0], width=2) == ["▁▁"]
    assert drawn([1, 3, 4, 4], width=2) == ["▄█"], "points of one column are averaged"
    assert plot([(0, 1), (9, 1)], start=0, end=10, width=10, height=1) == ["█        █"]
    assert plot([(-5, 1), (99, 1)], start=0, end=10, width=3, height=1) == ["█ █"]
    assert plot([], start=0, end=1, width=3, height=1) == [""]


async def test_metrics_that_are_no_numbers_are_not_plotted(capsys: pytest.CaptureFixture[str]) -> None:
    now = datetime.now(UTC)

    class Plane:
        async def get_deployment_metrics(self, *_: Any, **__: Any) -> DeploymentMetrics:
            values = [MetricPoint(value=value, timestamp=now) for value in (math.nan, 2.0, math.inf)]
            return DeploymentMetrics(cpu_usage=values, cpu_memory_usage_bytes=values[:1])

    plane: Any = Plane()
    await _metrics.show(plane, "d", "1h", as_json=False)
    assert capsys.readouterr().out.splitlines()[0] == "cpu_usage: 2 now, 2 at most"
