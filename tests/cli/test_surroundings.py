"""Where a command runs changes no more than it must: without streams, with a full disk, in other encodings, in CI."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from loops_async.cli import _show
from loops_local import LocalService
from tests.cli.conftest import COMMAND, Cli
from tests.support.patience import PATIENCE_SECONDS


def ran(redirection: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a shell starts it with `redirection`."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def test_without_a_standard_input_nothing_can_be_asked() -> None:
    ended = ran("<&-", "runs", "list")
    assert ended.returncode == 2
    assert ended.stderr.startswith("loops: no API key: set BASETEN_API_KEY")


@pytest.mark.parametrize("redirection", [">&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_is_not_missed(redirection: str) -> None:
    ended = ran(redirection, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this disk, which is always full")
def test_a_full_disk_is_one_readable_line() -> None:
    ended = ran(">/dev/full", "--help")
    assert ended.returncode == 1
    assert ended.stderr == "loops: cannot write the output: [Errno 28] No space left on device.\n"


def test_a_page_is_printed_in_any_encoding() -> None:
    ended = ran("", "sample", "--help", PYTHONIOENCODING="latin-1")
    assert ended.returncode == 0
    assert r'{"messages": \u2026}' in ended.stdout


@pytest.mark.parametrize("encoding", ["latin-1", "koi8-r"])
def test_json_stays_json_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding))
    _show.prepare_streams()
    _show.show_json({"name": 'è "☃" 😀'})
    sys.stdout.flush()
    assert json.loads(written.getvalue().decode(encoding)) == {"name": 'è "☃" 😀'}


def test_bytes_that_are_no_text_are_refused(cli: Cli) -> None:
    assert "has bytes that are no utf-8 text" in cli.fails("runs", "list", "--model", os.fsdecode(b"\xff"), code=2)


@pytest.mark.parametrize("arguments", [["top"], ["runs", "create", "echo"]], ids=" ".join)
def test_what_asks_for_colors_is_no_terminal(local: LocalService, arguments: Sequence[str]) -> None:
    ended = ran(
        "", *arguments, FORCE_COLOR="1", LOOPS_BASE_URL=local.base_url, BASETEN_API_KEY=local.api_key, TERM="xterm"
    )
    assert ended.returncode == 0, "it ends, though it is live in a terminal"
    moves = ("\x1b[?", "\x1b[2K", "\r")
    assert not any(move in ended.stdout + ended.stderr for move in moves)
