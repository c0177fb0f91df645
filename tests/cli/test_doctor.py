"""``loops doctor``: each finding says what to do, and the code is that of the first failure."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loops_async.cli import doctor
from loops_local import LocalService
from tests.cli.conftest import Cli
from tests.support.certificates import self_signed

CHECKS = ["key", "address", "TLS", "proxy", "versions", "limits", "clock"]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(doctor, "open_file_limit", lambda: 65536)


def examined(cli: Cli, *before: str, code: int = 0) -> dict[str, Any]:
    findings = json.loads(cli(*before, "doctor", "--json", code=code))
    return {each["check"]: each for each in findings}


def test_all_is_well(cli: Cli, local: LocalService) -> None:
    found = examined(cli)
    assert list(found) == CHECKS
    assert {each["state"] for each in found.values()} == {"ok"}
    assert found["key"]["found"] == f"…{local.api_key[-4:]} of BASETEN_API_KEY; the service accepts it"
    assert found["address"]["found"].startswith(f"{local.base_url}, at 127.0.0.1, connected in ")
    assert "loops-async" in found["versions"]["found"]
    lines = cli("doctor").splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == CHECKS


def test_a_bad_key(cli: Cli) -> None:
    cli.environment["BASETEN_API_KEY"] = "a-key-that-nobody-has"
    found = examined(cli, code=3)
    assert found["key"]["state"] == "failed"
    assert found["key"]["found"].startswith("…-has of BASETEN_API_KEY: ")
    assert "Check the API key" in found["key"]["found"]
    assert found["address"]["state"] == "ok"


def test_no_key(cli: Cli) -> None:
    cli.environment["BASETEN_API_KEY"] = ""
    found = examined(cli, code=2)
    assert found["key"]["found"].startswith("no API key: set BASETEN_API_KEY (create a key")
    assert found["address"]["state"] == "ok"


def test_an_unreachable_host(cli: Cli) -> None:
    found = examined(cli, "--base-url", "http://127.0.0.1:1", code=6)
    assert "could not connect to 127.0.0.1:1" in found["address"]["found"]
    assert "Check --base-url or LOOPS_BASE_URL and the network." in found["address"]["found"]
    assert found["key"]["state"] == found["clock"]["state"] == "unknown"


def test_what_is_no_loops_service(cli: Cli, local: LocalService) -> None:
    local.faults.answer("GET */capabilities", 200, [])
    found = examined(cli, code=6)
    assert "is not what Loops sends" in found["key"]["found"]
    assert "Check --base-url or LOOPS_BASE_URL." in found["key"]["found"]


def test_wrong_settings(cli: Cli) -> None:
    found = examined(cli, "--base-url", "ftp://x", code=2)
    assert list(found) == ["settings", "versions", "limits"]
    assert found["settings"]["found"].startswith("--base-url must be an absolute http or https URL")


@pytest.mark.parametrize(("hours", "words"), [(3, "ahead of the service"), (-3, "behind the service")])
def test_a_wrong_clock(cli: Cli, monkeypatch: pytest.MonkeyPatch, hours: int, words: str) -> None:
    def now(_: Any) -> datetime:
        return datetime.now(UTC) + timedelta(hours=hours)

    monkeypatch.setattr(doctor, "datetime", SimpleNamespace(now=now))
    found = examined(cli, code=1)["clock"]
    assert found["state"] == "failed"
    assert words in found["found"]
    assert found["advice"].startswith("Set this machine's clock")


def test_a_proxy_of_the_environment(cli: Cli) -> None:
    cli.environment |= {"LOOPS_BASE_URL": "https://loops.invalid", "HTTPS_PROXY": "http://me:secret@127.0.0.1:1"}
    found = examined(cli, code=6)
    assert "could not connect to the proxy 127.0.0.1:1" in found["address"]["found"]
    assert found["proxy"]["found"] == "requests to loops.invalid go through 127.0.0.1:1, as HTTPS_PROXY says."
    assert found["proxy"]["advice"] == "To connect without it, add loops.invalid to NO_PROXY."
    assert "secret" not in str(found)


def test_a_proxy_that_is_not_used(cli: Cli) -> None:
    cli.environment["HTTP_PROXY"] = "http://127.0.0.1:1"
    assert "HTTP_PROXY is not used for 127.0.0.1" in examined(cli)["proxy"]["found"]


class _Capabilities(BaseHTTPRequestHandler):
    """Answers like a service without models, and tells the time."""

    def do_GET(self) -> None:
        body = b'{"supported_models": []}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


class _QuietServer(ThreadingHTTPServer):
    """Says nothing about clients that go away, which would be read as the command's own output."""

    def handle_error(self, *_: Any) -> None: ...


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    return self_signed(tmp_path)


@pytest.fixture
def secure(certificate: tuple[Path, Path]) -> Iterator[str]:
    """The URL of a service behind TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    with _QuietServer(("127.0.0.1", 0), _Capabilities) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        yield f"https://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        serving.join()


def test_tls(cli: Cli, secure: str, certificate: tuple[Path, Path]) -> None:
    cli.environment |= {"LOOPS_BASE_URL": secure}
    untrusted = examined(cli, code=6)
    assert untrusted["address"]["state"] == "ok", "it was reached"
    assert untrusted["TLS"]["state"] == "failed"
    assert (
        "set SSL_CERT_FILE to the file of the authority that signed it before the command" in untrusted["TLS"]["found"]
    )
    assert untrusted["TLS"]["advice"].startswith("If it is about a date: this machine's clock says ")
    cli.environment["SSL_CERT_FILE"] = str(certificate[0])
    trusted = examined(cli)["TLS"]
    assert trusted["state"] == "ok"
    assert trusted["found"].startswith("TLSv1.3, the server's certificate is valid until ")
    assert trusted["found"].endswith(f"certificates of {certificate[0]}")


def test_few_open_files(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "open_file_limit", lambda: 256)
    found = examined(cli)["limits"]
    assert found["state"] == "warning"
    assert "256 files and connections: enough for 192 samples in flight, not for 2048" in found["found"]
    assert found["advice"].startswith("Run `ulimit -n 2731` before the program")
    cli.environment["BT_LOOPS_MAX_CONNECTIONS"] = "100"
    assert examined(cli)["limits"]["state"] == "ok"


def test_a_command_of_the_same_name(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = SimpleNamespace(value="baseten_loops.cli:main", dist=SimpleNamespace(name="baseten-loops"))
    ours = SimpleNamespace(value="loops_async.cli:main", dist=SimpleNamespace(name="loops-async"))
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", lambda **_: [ours, theirs])
    found = examined(cli)["versions"]
    assert found["state"] == "warning"
    assert "The package baseten-loops installs a command `loops`, too." in found["found"]
    assert found["advice"].startswith("Use `loops-async`")
