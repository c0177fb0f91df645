"""What is shown fits, is whole, and goes where it belongs: tables, ids, help pages, in terminals and in pipes."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import typer.main
from hypothesis import given, settings
from hypothesis import strategies as st

import loops_sync
from loops_async.cli import _connection
from loops_async.cli._app import app
from loops_async.cli._exit_codes import ENDINGS
from loops_async.cli._help import arguments, options, page, subcommands, takes_value, walk
from loops_async.cli._table import GAP, lay_out
from loops_local import LocalService
from tests.cli.conftest import Cli
from tests.support.patience import PATIENCE_SECONDS

COMMAND = [sys.executable, "-m", "loops_async.cli"]
"""Without an option for warnings, which would be printed: what is printed is compared."""

ROOT = typer.main.get_command(app)
EVERY_COMMAND = [pytest.param(path, command, id=path or "loops") for path, command in walk(ROOT)]


class Terminal:
    """Runs commands in a terminal of its own."""

    def __init__(self, local: LocalService) -> None:
        self._environment = {
            **{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")},
            "LOOPS_BASE_URL": local.base_url,
            "BASETEN_API_KEY": local.api_key,
            "TERM": "xterm-256color",
        }

    def __call__(self, *arguments: str, width: int, **environment: str) -> str:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        command = [*COMMAND, *arguments]
        with subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=self._environment | environment
        ) as process:
            os.close(slave)
            shown = b"".join(_pieces(master))
            assert process.wait(PATIENCE_SECONDS) == 0
        os.close(master)
        return shown.decode().replace("\r\n", "\n")


def _pieces(master: int) -> Iterator[bytes]:
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux says so at the end
            return
        if not piece:
            return
        yield piece


@pytest.fixture
def terminal(local: LocalService) -> Terminal:
    return Terminal(local)


MODEL = "an-organization/a-model-with-a-rather-long-name"


@pytest.fixture(scope="session")  # as long as the service: a module that is entered twice would make a second row
def run_id(local: LocalService) -> str:
    with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="leave") as service:
        return service.create_lora_training_client(MODEL, name="a-name").run_id


@pytest.mark.parametrize(
    ("width", "environment", "expected"),
    [
        (17, {"TERM": "dumb"}, ["run", "status", "model", "created", "sampler", "sampler status", "name"]),
        (40, {"NO_COLOR": "1"}, ["run  status"]),
        (80, {}, ["run  status  model"]),
    ],
)
def test_columns_go_from_the_right(
    terminal: Terminal, run_id: str, width: int, environment: dict[str, str], expected: Sequence[str]
) -> None:
    printed = terminal("runs", "list", "--model", MODEL, width=width, **environment)
    assert ("\x1b[1m" in printed) == (not environment), "bold, unless no color is wanted or possible"
    assert "\x1b" not in printed or not environment
    shown, _, notice = re.sub(r"\x1b\[\d*m", "", printed).partition("not shown for lack of width: ")
    table = shown.splitlines()
    if len(expected) == 1:
        head, row = table
        assert head.split() == expected[0].split()
        assert row.split()[:2] == [run_id, "ACTIVE"]
        assert len(row) <= width
        assert " ".join(notice.split()).endswith("sampler, sampler status, name; --json has all")
    else:
        assert table[0] == f"run             {run_id}"
        assert f"model           {MODEL}" in table
        assert [line[:14].rstrip() for line in table] == expected


def test_a_pipe_gets_every_column(cli: Cli, run_id: str) -> None:
    head, row = cli("runs", "list", "--model", MODEL).splitlines()
    assert head.split() == ["run", "status", "model", "created", "sampler", "sampler", "status", "name"]
    assert row.startswith(f"{run_id}  ACTIVE  {MODEL}  ")
    assert cli.err == ""


cells = st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1, max_size=12)


@settings(max_examples=50)
@given(st.lists(st.lists(st.none() | cells, min_size=4, max_size=4), min_size=1, max_size=5), st.integers(1, 60))
def test_no_value_is_ever_cut(rows: list[list[str | None]], width: int) -> None:
    names = ["id", "status", "model", "name"]
    layout = lay_out(names, rows, width=width, least=2)
    shown = names[: len(names) - len(layout.left_out)]
    if layout.head:
        assert len(shown) >= 2
        assert lay_out(shown, [row[: len(shown)] for row in rows], width=None, least=1).lines == layout.lines
    lines = iter(layout.lines[layout.head :])
    for row in rows:
        block = [next(lines)] if layout.head else [next(lines) for value in row if value is not None]
        for value in row[: len(shown)]:
            assert value is None or any(value in line for line in block)
        if not layout.head:
            next(lines, None)


def test_a_wide_character_takes_two_columns() -> None:
    layout = lay_out(["id", "status"], [["河馬", "x"], ["ab", "y"]], width=4 + GAP + 6, least=2)
    assert layout.lines == ["id    status", "河馬  x", "ab    y"]
    assert lay_out(["id", "status"], [["河馬", "x"]], width=4 + GAP + 5, least=2).lines == ["id      河馬", "status  x"]


@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize(("path", "command"), EVERY_COMMAND)
def test_help_cuts_no_word(path: str, command: Any, width: int) -> None:
    shown = page(command, f"loops {path}".rstrip(), width)
    words = shown.split()
    for name, text in [*arguments(command), *options(command), *subcommands(command)]:
        assert f"{name}\n" in shown or f"{name} " in shown
        assert set(text.replace("\xa0", " ").split()) <= set(words), name
    names = [name for name, _ in [*arguments(command), *options(command), *subcommands(command)]]
    longest = max(map(len, names), default=0) + 2
    assert all(len(line) <= max(width, longest) or len(line.split()) == 1 for line in shown.splitlines())


@pytest.mark.parametrize(("path", "command"), EVERY_COMMAND)
def test_a_flag_shows_no_value(path: str, command: Any) -> None:
    shown = dict(options(command))
    for option in command.params:
        if option.param_type_name == "option":
            assert option.help, f"{path} {option.name}"
            [display] = [each for each in shown if each.split(" ")[0].rstrip(",") in option.opts]
            names = [each for each in display.replace(",", "").split() if each not in option.opts]
            assert bool(names) == takes_value(option), display
            assert "<" not in display


def test_a_help_page_is_shown_by_the_command(terminal: Terminal) -> None:
    shown = terminal("runs", "create", "--help", width=40)
    assert "  --scale-down-delay SECONDS\n      Time without requests until it is\n" in shown
    assert max(map(len, shown.splitlines())) <= 40


def test_the_help_has_the_exit_codes(cli: Cli) -> None:
    words = " ".join(cli("--help").split())
    for ending in ENDINGS:
        assert f"{ending.code} {ending.short}" in words


def test_no_command_is_answered_by_the_help_page(cli: Cli) -> None:
    assert cli("runs", code=2) == ""
    assert cli.err.startswith("Usage: ")


@pytest.mark.parametrize(
    "command",
    [
        ["runs", "list"],
        ["samplers", "list"],
        ["deployments", "list"],
        ["checkpoints", "list", "--model", MODEL],
        ["capabilities"],
        ["ps"],
    ],
    ids=" ".join,
)
def test_quiet_is_the_first_column(cli: Cli, run_id: str, command: Sequence[str]) -> None:
    _, *rows = cli(*command).splitlines() or [""]
    assert cli(*command, "-q").split() == [row.split()[0] for row in rows]


def test_quiet_with_one_object(cli: Cli, run_id: str) -> None:
    assert cli("runs", "show", run_id, "-q") == f"{run_id}\n"
    [made] = cli("samplers", "create", "echo", "--no-wait", "-q").split()
    assert cli("samplers", "show", made, "-q") == f"{made}\n"
    assert cli("samplers", "deactivate", made, "-q") == f"{made}\n"


@pytest.mark.parametrize("arguments", [["capabilities"], ["capabilities", "--json"]], ids=" ".join)
def test_a_closed_pipe_ends_a_command_silently(local: LocalService, arguments: Sequence[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"LOOPS_BASE_URL": local.base_url, "BASETEN_API_KEY": local.api_key}
    ended = subprocess.run(
        [*COMMAND, *arguments], stdout=writing, stderr=subprocess.PIPE, env=environment, timeout=PATIENCE_SECONDS
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_a_notice_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    record = _connection.logging.LogRecord("loops_async", 30, "", 0, "%s", ("word " * 200,), None)
    _connection._Notices().emit(record)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"loops: {'word ' * 200}".rstrip() + "\n"


def test_progress_is_told_where_it_cannot_be_shown(cli: Cli, trained: tuple[str, str], tmp_path: Any) -> None:
    done = cli("checkpoints", "download", trained[1], "--to", str(tmp_path), "--json")
    assert json.loads(done)["file_count"] == 2
    assert cli.err.startswith("download: ")
