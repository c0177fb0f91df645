from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import sys
from pathlib import Path

import aiohttp
import pytest

from loops_local import LocalService, serve_in_thread
from loops_local.__main__ import main
from loops_local._service import DEFAULT_MODELS
from tests.support.patience import PATIENCE_SECONDS


def start(*arguments: str, **environment: str) -> asyncio.Task[asyncio.subprocess.Process]:
    env = {name: value for name, value in os.environ.items() if name != "BASETEN_API_KEY"} | environment
    return asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loops_local", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
        )
    )


async def banner(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readuntil(b"Press Ctrl-C to stop.\n")).decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_serve_tells_how_to_use_it_and_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    process = await start("serve", "--engine", "echo", "--port", "0", "--data-dir", str(tmp_path))
    said = await banner(process)
    found = re.search(r"LOOPS_BASE_URL=(\S+)", said)
    assert found
    url = found[1]
    key = (tmp_path / "api_key").read_text()
    assert key not in said
    assert f'BASETEN_API_KEY="$(cat {tmp_path / "api_key"})"' in said
    assert stat.S_IMODE((tmp_path / "api_key").stat().st_mode) == 0o600
    assert "nothing is learned" in said
    assert f"{url}/local/trainer" in said
    assert f"{url}/dashboard#token={(tmp_path / 'dashboard_token').read_text()}\n" in said
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.request("GET", f"{url}/v1/loops/capabilities", headers=headers) as response:
        assert response.status == 200
    process.send_signal(number)
    _, errors = await process.communicate()
    assert process.returncode == 0
    assert b"Traceback" not in errors


async def test_the_key_may_come_from_the_environment_and_is_not_shown_or_kept(tmp_path: Path) -> None:
    arguments = ("serve", "--engine", "echo", "--port", "0", "--data-dir", str(tmp_path))
    process = await start(*arguments, BASETEN_API_KEY="from-outside")
    said = await banner(process)
    assert "from-outside" not in said
    assert not (tmp_path / "api_key").exists()
    process.terminate()
    await process.communicate()


async def failure(*arguments: str) -> str:
    process = await start(*arguments)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            _, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode not in (0, None)
    return errors.decode()


async def test_a_port_in_use_is_one_readable_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = await failure("serve", "--engine", "echo", "--port", port, "--data-dir", str(tmp_path))
    assert said == f"loops-local: port {port} of 127.0.0.1 is in use; choose another with --port (0 takes any)\n"


async def test_a_data_directory_in_use_is_one_readable_line(tmp_path: Path) -> None:
    async with LocalService(engine="echo", data_dir=tmp_path):
        said = await failure("serve", "--engine", "echo", "--port", "0", "--data-dir", str(tmp_path))
    assert said == f"loops-local: {tmp_path} is in use by another loops-local service\n"


def dashboard(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["loops-local", "dashboard", *map(str, arguments)])
    main()


def test_the_dashboard_of_a_running_service_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve_in_thread(engine="echo", data_dir=tmp_path / "data") as local:
        dashboard(monkeypatch, "--data-dir", tmp_path / "data", "--url", local.base_url)
        monkeypatch.setenv("LOOPS_BASE_URL", f"{local.base_url}/v1/loops/")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        dashboard(monkeypatch, "--data-dir", tmp_path / "data")
        dashboard(monkeypatch, "--data-dir", tmp_path / "data", "--json")
        first, second, third = capsys.readouterr().out.splitlines()
        assert first == second == json.loads(third)["url"] == local.dashboard_url


def test_a_dashboard_that_would_not_open_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dashboard_token").write_text("of-another-service")
    with serve_in_thread(engine="echo") as local:
        url = local.base_url
        for arguments, problem in {
            ("--data-dir", tmp_path / "nothing", "--url", url): "No such file or directory; name the service's data",
            ("--data-dir", tmp_path, "--url", url): "has another data directory; name it with --data-dir",
            ("--data-dir", tmp_path, "--url", "file:///etc"): "must begin with http://",
            ("--data-dir", tmp_path, "--url", "http://127.0.0.1:1"): "start it with loops-local serve",
        }.items():
            with pytest.raises(SystemExit) as ending:
                dashboard(monkeypatch, *arguments)
            assert problem in str(ending.value)
            assert "\n" not in str(ending.value)
    assert capsys.readouterr().out == ""


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(SystemExit, match=r"^loops-local: this user has no home directory: set HOME$"):
        dashboard(monkeypatch)


async def test_it_starts_in_any_encoding(tmp_path: Path) -> None:
    data = tmp_path / "\N{SNOWMAN}"
    process = await start(
        *("serve", "--engine", "echo", "--port", "0", "--data-dir", str(data)), PYTHONIOENCODING="ascii"
    )
    assert r"\u2603" in await banner(process)
    process.terminate()
    await process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("--port", "99999"), "0 to 65535"),
        (("--port", "x"), "invalid"),
        (("--provisioning-seconds", "-1"), "0 or more"),
        (("--engine", "tpu"), "echo"),
    ],
)
def test_wrong_arguments_are_explained(
    arguments: tuple[str, ...], rule: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loops-local", "serve", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert rule in capsys.readouterr().err


def test_help_cuts_no_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "argv", ["loops-local", "serve", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert DEFAULT_MODELS[0] in capsys.readouterr().out


async def test_an_unusable_data_directory_is_one_readable_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = await failure("serve", "--engine", "echo", "--data-dir", str(tmp_path / "file"))
    assert said.startswith("loops-local: cannot start: ")
    assert len(said.splitlines()) == 1
