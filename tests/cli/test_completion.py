"""Completion scripts, in the shells that are installed: commands and options by themselves, ids from the service."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer.main

import loops_sync
from loops_async.cli._app import app
from loops_async.cli._shells import SCRIPTS
from loops_async.cli.completion import nodes
from loops_local import LocalService
from tests.cli.conftest import Cli
from tests.support.patience import PATIENCE_SECONDS

NODES = list(nodes(typer.main.get_command(app)))


@pytest.fixture(scope="module")
def some(local: LocalService) -> Sequence[str]:
    """The ids of a run, of a standalone sampler, and of a checkpoint."""
    with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="leave") as service:
        trainer = service.create_lora_training_client("echo")
        trainer.save_state("end").result()
        [checkpoint] = service.control_plane.list_checkpoints(run_id=trainer.run_id)
        return trainer.run_id, str(service.create_sampling_client("echo").sampler_id), checkpoint.id


class Shell:
    """A shell that has read its script, and in which `loops` is on the PATH."""

    def __init__(self, name: str, folder: Path, local: LocalService) -> None:
        self._name = name
        self._script = folder / f"loops.{name}"
        self._script.write_text(SCRIPTS[name](NODES))
        program = folder / "loops"
        root = Path(__file__).parents[2]
        program.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -m loops_async.cli "$@"\n')
        program.chmod(0o755)
        self.environment = {
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            "LOOPS_BASE_URL": local.base_url,
            "BASETEN_API_KEY": local.api_key,
            "LOOPS_COMPLETION_SECONDS": str(PATIENCE_SECONDS),
        }

    def __call__(self, *words: str) -> list[str]:
        """Return how the last word may be completed."""
        command = {
            "bash": ["bash", "--norc", "-c", _BASH],
            "fish": ["fish", "--no-config", "-c", f"source {self._script}; complete -C '{' '.join(words)}'"],
        }[self._name]
        arguments = [str(self._script), *words] if self._name == "bash" else []
        ended = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, env=self.environment, timeout=PATIENCE_SECONDS
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        return [line.split("\t")[0].strip() for line in ended.stdout.splitlines()]


_BASH = """
source "$0"
COMP_LINE="$*" COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
"$(complete -p loops | sed 's/.*-F \\([^ ]*\\).*/\\1/')" loops
[ "${#COMPREPLY[@]}" -eq 0 ] || printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(params=["bash", "fish"])
def shell(request: pytest.FixtureRequest, tmp_path: Path, local: LocalService) -> Shell:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return Shell(request.param, tmp_path, local)


def test_commands_and_options_need_no_service(shell: Shell) -> None:
    (Path(shell.environment["HOME"]) / "loops").unlink()
    assert set(shell("loops", "ru")) == {"runs"}
    assert set(shell("loops", "--team", "runs", "runs", "")) == {
        *("create", "list", "show", "wait", "logs", "metrics", "deactivate")
    }
    assert set(shell("loops", "runs", "create", "--r")) == {"--rank", "--replicas", "--ready-timeout"}
    assert set(shell("loops", "runs", "logs", "--level", "W")) == {"WARNING"}
    assert set(shell("loops", "completion", "")) == {"bash", "zsh", "fish", "powershell"}
    assert shell("loops", "runs", "create", "echo", "--name", "") == []


def test_ids_come_from_the_service(shell: Shell, some: Sequence[str]) -> None:
    run, sampler, checkpoint = some
    assert run in shell("loops", "runs", "show", "")
    assert run in shell("loops", "checkpoints", "list", "--run", run[:3])
    assert {run, sampler} <= set(shell("loops", "down", ""))
    assert checkpoint in shell("loops", "checkpoints", "files", checkpoint[:4])


def test_files_are_completed_by_the_shell(shell: Shell) -> None:
    place = Path(shell.environment["HOME"]) / "prompts.jsonl"
    place.touch()
    assert shell("loops", "sample", "--input", f"{place.parent}/prom") == [str(place)]


def test_bash_reads_a_value_behind_an_equals_sign_and_the_service_of_the_line(
    tmp_path: Path, local: LocalService, some: Sequence[str]
) -> None:
    shell = Shell("bash", tmp_path, local)
    assert some[0] in shell("loops", "checkpoints", "list", "--run", "=", "")
    shell.environment["LOOPS_BASE_URL"] = "http://127.0.0.1:1"
    assert some[0] in shell("loops", "--base-url", local.base_url, "runs", "show", "")


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_a_script_is_valid(name: str, tmp_path: Path, cli: Cli) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    script = tmp_path / "script"
    script.write_text(cli("completion", name))
    ended = subprocess.run([name, "-n", str(script)], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_script_for_powershell_has_every_command(cli: Cli) -> None:
    script = cli("completion", "powershell")
    assert script.startswith("Register-ArgumentCompleter -Native -CommandName 'loops', 'loops-async'")
    assert all(f"'{node.path}' = @{{ commands = @(" in script for node in NODES)


def test_no_option_is_a_flag_here_and_takes_a_value_there() -> None:
    flags = {name for node in NODES for option in node.options if option.value is None for name in option.names}
    takes = {name for node in NODES for option in node.options if option.value is not None for name in option.names}
    assert not flags & takes


def ids(kind: str, **environment: str) -> tuple[int, str, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "loops_async.cli", "__ids", kind],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": os.environ["PATH"]} | environment,
        timeout=PATIENCE_SECONDS,
    )
    return ended.returncode, ended.stdout, ended.stderr


SILENT = (0, "", "")


def test_ids_are_silent_when_that_fails(local: LocalService) -> None:
    assert ids("runs") == SILENT, "no key"
    known = {"LOOPS_BASE_URL": local.base_url, "BASETEN_API_KEY": local.api_key}
    assert ids("runs", **known | {"BASETEN_API_KEY": "none-of-the-keys"}) == SILENT
    assert ids("runs", **known | {"LOOPS_BASE_URL": "http://127.0.0.1:1", "ALL_PROXY": "socks5://x"}) == SILENT


def test_ids_do_not_wait_for_a_service_that_does_not_answer(local: LocalService) -> None:
    local.faults.delay("GET */runs", 3600.0)
    assert ids("runs", LOOPS_BASE_URL=local.base_url, BASETEN_API_KEY=local.api_key) == SILENT
    local.faults.clear()


def test_an_id_that_means_something_to_a_shell_is_left_out(local: LocalService) -> None:
    run = {"session_id": "s", "base_model": "m", "base_url": "http://127.0.0.1", "created_at": "2026-01-01T00:00:00Z"}
    answered = {"runs": [run | {"id": "fine-1"}, run | {"id": "$(touch/hacked)"}, run | {"id": "a;b"}]}
    local.faults.answer("GET */runs", 200, answered)
    patient = {"LOOPS_COMPLETION_SECONDS": str(PATIENCE_SECONDS)}
    printed = ids("runs", LOOPS_BASE_URL=local.base_url, BASETEN_API_KEY=local.api_key, **patient)
    assert printed == (0, "fine-1\n", "")
