"""Where the log goes, and how the stages of provisioning are printed."""

from __future__ import annotations

import io
import logging
import os
import sys
import termios
from typing import Any, TextIO

import pytest

from loops_async import InputError, ProvisioningEvent, log_to_stderr, print_progress
from loops_async import _logs as logs
from loops_async import _progress as progress
from tests.support.work import run_python


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """Standard error, before any log was set up."""
    for one in map(logging.getLogger, logs.LOGGERS):
        one.setLevel(logging.NOTSET)
        one.handlers.clear()
    return capsys


def say() -> None:
    for name in ("loops_async.http", "loops_local.operations"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(level, "%s", logging.getLevelName(level).lower())


def lines_of(shown: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines without their times."""
    return [line.split(" ", 2)[2] if line[:2] == "20" else line for line in shown.readouterr().err.splitlines()]


def start(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's, which come after the fixtures
    monkeypatch.setenv("LOOPS_LOG", level)
    logs.log_as_the_environment_says()


async def test_importing_the_package_reads_the_environment() -> None:
    script = "import logging, loops_sync; print(logging.getLogger('loops_local.http').getEffectiveLevel())"
    assert await run_python(script, LOOPS_LOG="debug") == str(logging.DEBUG)


def test_a_level_of_the_environment_shows_both_packages(
    shown: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start("INFO", monkeypatch)
    say()
    assert lines_of(shown) == [
        "INFO loops_async.http: info",
        "WARNING loops_async.http: warning",
        "INFO loops_local.operations: info",
        "WARNING loops_local.operations: warning",
    ]


def test_off_shows_nothing(shown: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    start("off", monkeypatch)
    say()
    assert lines_of(shown) == []


def test_without_a_level_nothing_is_set_up(shown: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    start("", monkeypatch)
    say()
    assert lines_of(shown) == ["warning", "warning"]


def test_twice_is_once_and_changes_the_level(
    shown: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start("debug", monkeypatch)
    log_to_stderr("warning")
    say()
    assert lines_of(shown) == ["WARNING loops_async.http: warning", "WARNING loops_local.operations: warning"]


def test_the_handler_of_a_program_is_enough(shown: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    start("info", monkeypatch)
    logging.basicConfig(format="root: %(message)s")
    say()
    assert lines_of(shown) == ["root: info", "root: warning"] * 2


def test_another_word_is_answered_with_the_words(
    shown: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start("verbose", monkeypatch)
    assert lines_of(shown) == ["LOOPS_LOG must be debug, info, warning or off; got 'verbose'"]


@pytest.mark.usefixtures("shown")
def test_a_level_that_does_not_exist_is_refused() -> None:
    wrong: Any = "loud"
    with pytest.raises(InputError, match="level: must be debug, info, warning or off; got 'loud'"):
        log_to_stderr(wrong)
    log_to_stderr("warning")
    assert not logging.getLogger("loops_async.http").isEnabledFor(logging.INFO)


def event(stage: Any, status: str | None = None, id_: str = "cqbn0bvm2z", seconds: float = 3.6) -> ProvisioningEvent:
    return ProvisioningEvent(kind="run", id=id_, stage=stage, status=status, seconds=seconds)


STAGES = [event("created"), event("waiting", "DEPLOYING"), event("waiting", "UP"), event("ready")]


@pytest.fixture
def printer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_printer", progress._Printer())


def printed_in_a_terminal(columns: int, events: list[ProvisioningEvent], monkeypatch: pytest.MonkeyPatch) -> str:
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    monkeypatch.setenv("TERM", "xterm")
    try:
        with os.fdopen(follower, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            for one in events:
                print_progress(one)
            terminal.write("#")
            terminal.flush()
            shown = b""
            while not shown.endswith(b"#"):
                shown += os.read(leader, 4096)
    finally:
        os.close(leader)
    return shown.decode().removesuffix("#").replace("\r\n", "\n")


def test_stages_are_shown_to_nobody_where_there_is_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    for one in STAGES:
        print_progress(one)


@pytest.mark.usefixtures("printer")
def test_stages_take_a_line_each_where_nothing_can_be_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    for one in STAGES:
        print_progress(one)
    assert shown.getvalue().splitlines() == [
        "run cqbn0bvm2z: created, 3.6 s",
        "run cqbn0bvm2z: DEPLOYING, 3.6 s",
        "run cqbn0bvm2z: UP, 3.6 s",
        "run cqbn0bvm2z: ready, 3.6 s",
    ]


@pytest.mark.usefixtures("printer")
@pytest.mark.parametrize("columns", [40, 200])
def test_in_a_terminal_a_stage_replaces_the_one_before(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed_in_a_terminal(columns, STAGES, monkeypatch).split("\r") == [
        "run cqbn0bvm2z: created, 3.6 s",
        "run cqbn0bvm2z: DEPLOYING, 3.6 s",
        "run cqbn0bvm2z: UP, 3.6 s       ",
        "run cqbn0bvm2z: ready, 3.6 s\n",
    ]


@pytest.mark.usefixtures("printer")
def test_what_does_not_fit_into_the_terminal_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    long = event("waiting", "WAITING_FOR_A_FREE_MACHINE")
    assert printed_in_a_terminal(40, [STAGES[0], long, STAGES[-1]], monkeypatch).splitlines() == [
        "run cqbn0bvm2z: created, 3.6 s",
        "run cqbn0bvm2z: WAITING_FOR_A_FREE_MACHINE, 3.6 s",
        "run cqbn0bvm2z: ready, 3.6 s",
    ]


@pytest.mark.usefixtures("printer")
def test_runs_side_by_side_do_not_write_over_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [event("created", id_="one"), event("created", id_="two"), event("failed", id_="one")]
    assert printed_in_a_terminal(80, events, monkeypatch).splitlines() == [
        "run one: created, 3.6 s",
        "run two: created, 3.6 s",
        "run one: failed, 3.6 s",
    ]


@pytest.mark.usefixtures("printer")
def test_a_notebook_writes_over_lines_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook: type[TextIO] = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    shown: Any = notebook()
    monkeypatch.setattr(sys, "stderr", shown)
    print_progress(STAGES[1])
    print_progress(STAGES[3])
    assert shown.getvalue() == "run cqbn0bvm2z: DEPLOYING, 3.6 s\rrun cqbn0bvm2z: ready, 3.6 s    \n"


def test_a_status_of_a_service_cannot_move_the_cursor() -> None:
    assert progress.stage_line(event("waiting", "UP\x1b[2J\nDOWN")) == "run cqbn0bvm2z: UP\\x1b[2J DOWN, 3.6 s"
