"""Completion scripts, in the shells that are installed: commands and options by themselves, ids from the service."""

from __future__ import annotations

import os
import shlex
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
    """A shell that has read its script, and in which a program `loops` is on the PATH."""

    def __init__(self, name: str, folder: Path, program: str, **environment: str) -> None:
        self.name = name
        self._folder = folder
        self._script = folder / f"loops.{name}"
        self._script.write_text(SCRIPTS[name](NODES))
        self.program = folder / "loops"
        self.program.write_text(f"#!/bin/sh\n{program}\n")
        self.program.chmod(0o755)
        self._environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder), **environment}

    def __call__(self, *lines: str) -> list[set[str]]:
        """Return how the last word of each line may be completed; words are separated by single spaces."""
        command = {
            "bash": ["bash", "--norc", "-c", _BASH],
            "zsh": ["zsh", "-f", "-c", _ZSH + _BASH],
            "fish": ["fish", "--no-config", "-c", _FISH],
        }[self.name]
        ended = subprocess.run(
            [*command, str(self._script), *lines],
            capture_output=True,
            text=True,
            env=self._environment,
            cwd=self._folder,
            timeout=PATIENCE_SECONDS,
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        *answers, end = ended.stdout.split("--end--\n")
        assert (len(answers), end) == (len(lines), "")
        return [{line.split("\t")[0].strip() for line in answer.splitlines()} for answer in answers]


_ZSH = """
autoload -Uz compinit && compinit -D -u
setopt ksharrays shwordsplit
"""
"""What `bashcompinit` sets for the functions of bash that it calls."""

_BASH = """
source "$0"
for COMP_LINE in "$@"; do
    COMP_WORDS=($COMP_LINE)
    case "$COMP_LINE" in *" ") COMP_WORDS+=("") ;; esac
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _loops_complete loops
    for word in "${COMPREPLY[@]}"; do echo "$word"; done
    echo --end--
done
"""

_FISH = """
source $argv[1]
for line in $argv[2..-1]
    complete -C $line
    echo --end--
end
"""


KINDS_ONLY = 'echo "$1-$2-of-$LOOPS_BASE_URL"'
"""A program that answers what it was asked: Python takes half a second to start."""


@pytest.fixture(params=["bash", "zsh", "fish"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Shell:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return Shell(request.param, tmp_path, KINDS_ONLY, LOOPS_BASE_URL="here")


def test_commands_and_options_need_no_service(shell: Shell) -> None:
    shell.program.unlink()
    expected = {
        "loops ru": {"runs"},
        "loops --team runs runs ": {"create", "list", "show", "wait", "logs", "metrics", "deactivate"},
        "loops runs create --r": {"--rank", "--replicas", "--ready-timeout"},
        "loops runs logs --level W": {"WARNING"},
        "loops completion ": {"bash", "zsh", "fish", "powershell"},
        "loops runs create echo --name ": set[str](),
    }
    assert dict(zip(expected, shell(*expected), strict=True)) == expected


def test_ids_are_asked_for(shell: Shell) -> None:
    kinds = {
        "loops runs show ": "runs",
        "loops runs deactivate some other ": "runs",
        "loops checkpoints list --run __ids-r": "runs",
        "loops samplers show ": "samplers",
        "loops checkpoints files ": "checkpoints",
        "loops deployments logs ": "deployments",
        "loops down some ": "running",
    }
    assert shell(*kinds) == [{f"__ids-{kind}-of-here"} for kind in kinds.values()]


def test_ids_come_from_the_service(tmp_path: Path, local: LocalService, some: Sequence[str]) -> None:
    run, sampler, checkpoint = some
    root, python = shlex.quote(str(Path(__file__).parents[2])), shlex.quote(sys.executable)
    program = f'PYTHONPATH={root} exec {python} -m loops_async.cli "$@"'
    environment = {"LOOPS_BASE_URL": local.base_url, "BASETEN_API_KEY": local.api_key}
    shell = Shell("bash", tmp_path, program, **environment, LOOPS_COMPLETION_SECONDS=str(PATIENCE_SECONDS))
    running, files = shell("loops down ", f"loops checkpoints files {checkpoint[:4]}")
    assert {run, sampler} <= running
    assert checkpoint in files


@pytest.mark.parametrize("name", ["bash", "fish"])  # zsh has file names only while it completes
def test_files_are_completed_by_the_shell(name: str, tmp_path: Path) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    (tmp_path / "prompts.jsonl").touch()
    assert Shell(name, tmp_path, KINDS_ONLY)("loops sample --input prom") == [{"prompts.jsonl"}]


def test_bash_reads_a_value_behind_an_equals_sign_and_the_service_of_the_line(tmp_path: Path) -> None:
    shell = Shell("bash", tmp_path, KINDS_ONLY)
    assert shell("loops --base-url http://x runs show ") == [{"__ids-runs-of-http://x"}]
    assert shell("loops checkpoints list --run = ") == [{"__ids-runs-of-"}]


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
