"""What is told of requests: lines of the log, and the file of a request log. Neither has a secret."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from loops_async import ConfigError, NotFoundError, ServiceClient
from loops_async._http import request_log
from tests.support.clock import Clock
from tests.support.colours import Colour
from tests.support.files import FILES, SIGNED, FileStore, entry, page
from tests.support.scripted import KEY, MODEL, Say, ScriptedService, hang_up_in_the_body

PROMPT = [4711, 4712]
SECRET = f"https://store.invalid/a?X-Amz-Signature={'5' * 64}"


@pytest.fixture(autouse=True)
def no_runs(service: ScriptedService) -> None:
    service.always("GET", "/v1/loops/runs", Say(body={"runs": []}))


def requests_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [one for one in caplog.records if one.name == "loops_async.http" and one.levelno == logging.DEBUG]


def facts_of(record: logging.LogRecord) -> dict[str, Any]:
    facts: dict[str, Any] = vars(record)["loops"]
    return facts


def written(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def debug(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "loops_async")
    return caplog


async def test_each_attempt_has_a_line_and_its_facts(
    service: ScriptedService, colour: Colour, debug: pytest.LogCaptureFixture
) -> None:
    service.answer("POST", "/v1/loops/sessions", Say(body={"session": {"id": "s1"}}, headers={"X-Request-Id": "5f"}))
    async with colour.connected(api_key=KEY, base_url=service.url):
        pass
    (record,) = requests_of(debug)
    facts = facts_of(record)
    ms = facts.pop("ms")
    assert facts == {
        "method": "POST",
        "host": service.url.removeprefix("http://"),
        "path": "/v1/loops/sessions",
        "status": 200,
        "attempt": 1,
        "request_id": "5f",
        "bytes_sent": len(service.seen[0].body),
        "bytes_received": len('{"session": {"id": "s1"}}'),
    }
    assert record.getMessage() == (
        f"POST /v1/loops/sessions -> 200 in {ms:.0f} ms (attempt 1, request id 5f, "
        f"{facts['bytes_sent']} B sent, {facts['bytes_received']} B received)"
    )


async def test_attempts_are_counted_and_a_broken_connection_has_a_line(
    client: ServiceClient, service: ScriptedService, quick: Clock, debug: pytest.LogCaptureFixture
) -> None:
    service.always("GET", "/v1/loops/runs/r1", Say(body={"run": service.run()}))
    service.answer("GET", "/v1/loops/runs/r1", hang_up_in_the_body, Say(429))
    await client.control_plane.get_run("r1")
    with pytest.raises(NotFoundError):
        await client.control_plane.get_run("r2")
    lines = [(re.sub(r" in .*", "", one.getMessage()), facts_of(one)["attempt"]) for one in requests_of(debug)]
    assert lines[-4:] == [
        ("GET /v1/loops/runs/r1 -> ConnectError", 1),
        ("GET /v1/loops/runs/r1 -> 429", 2),
        ("GET /v1/loops/runs/r1 -> 200", 3),
        ("GET /v1/loops/runs/r2 -> 404", 1),
    ]


async def test_a_line_has_no_query_no_key_and_no_escape(
    client: ServiceClient, service: ScriptedService, store: FileStore, debug: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    store.holds({"a": b"12345"})
    service.answer("GET", "/v1/loops/runs", Say(body={"runs": []}, headers={"X-Request-Id": f"\x85[2J{KEY}"}))
    await client.control_plane.list_runs(base_model="secret-model")
    await client.download_checkpoint("c1", dest_dir=tmp_path)
    assert "checkpoint c1: downloaded, 1 files, 5 B fetched" in debug.text
    lines = [one.getMessage() for one in requests_of(debug)]
    assert any(line.startswith("GET /store/") for line in lines)
    shown = "\n".join([*lines, *(repr(facts_of(one)) for one in requests_of(debug))])
    for never in (KEY, SIGNED, "secret-model", "\x85"):
        assert never not in shown


async def test_neither_prompts_nor_completions_are_logged(
    client: ServiceClient, service: ScriptedService, debug: pytest.LogCaptureFixture
) -> None:
    sampler = await client.create_sampling_client(MODEL)
    names = {"tokens": ["Paris-4713"], "token_logprobs": [-1.0]}
    choice = {"index": 0, "text": "Paris-4713", "finish_reason": "stop", "logprobs": names}
    service.always("POST", "/sampler/sample", Say(body={"choices": [choice]}))
    assert (await sampler.sample(PROMPT)).sequences[0].text == "Paris-4713"
    assert "only the text is known" in debug.text
    service.always("POST", "/sampler/sample", Say(body={"text": "Paris-4713"}))
    assert [one async for one in sampler.sample_many([PROMPT], on_error="skip")] == []
    assert "prompt 0 is skipped" in debug.text
    assert "4713" not in debug.text
    assert "4711" not in debug.text


async def test_a_request_log_has_two_lines_for_each_attempt(
    service: ScriptedService, colour: Colour, tmp_path: Path
) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text("")
    file.chmod(0o644)
    async with colour.connected(api_key=KEY, base_url=service.url, request_log=file) as client:
        await client.control_plane.list_runs(base_model="m")
    sent, answered, *_ = lines = written(file)
    assert [(line["seq"], line["kind"]) for line in lines] == [
        (sent["seq"] + number // 2, ("request", "response")[number % 2]) for number in range(4)
    ]
    assert file.stat().st_mode & 0o777 == 0o600
    assert set(sent) == {"seq", "kind", "ts", "method", "url", "path", "headers", "body"}
    assert (sent["method"], sent["url"], sent["path"]) == (
        "POST",
        f"{service.url}/v1/loops/sessions",
        "/v1/loops/sessions",
    )
    assert json.loads(sent["body"]) == service.seen[0].json
    assert sent["headers"]["Authorization"] == "[REDACTED]"
    assert set(answered) == {"seq", "kind", "ts", "elapsed_ms", "status", "headers", "body"}
    assert (answered["status"], json.loads(answered["body"])) == (200, {"session": {"id": "s1"}})
    assert lines[2]["url"].endswith("/v1/loops/runs?base_model=m")
    assert lines[2]["path"] == "/v1/loops/runs"


async def test_a_request_without_an_answer_has_an_error_line(
    service: ScriptedService, quick: Clock, tmp_path: Path
) -> None:
    service.answer("GET", "/v1/loops/runs/r1", hang_up_in_the_body)
    file = tmp_path / "requests.jsonl"
    async with ServiceClient(api_key=KEY, base_url=service.url, request_log=file) as client:
        service.always("GET", "/v1/loops/runs/r1", Say(body={"run": service.run()}))
        await client.control_plane.get_run("r1")
    lines = [line for line in written(file) if line["kind"] != "request"]
    assert [line["kind"] for line in lines] == ["response", "error", "response"]
    assert set(lines[1]) == {"seq", "kind", "ts", "elapsed_ms", "error", "message"}
    assert (lines[1]["error"], lines[1]["elapsed_ms"] >= 0) == ("ConnectError", True)
    assert "broke" in lines[1]["message"]


async def test_a_request_log_has_no_secret(service: ScriptedService, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    service.always("GET", FILES, Say(body=page([entry(f"{service.url}/moved?{SIGNED}", "a", 5)])))
    service.always("GET", "/moved", Say(302, "", {"Location": f"/store/a?{SIGNED}", "Set-Cookie": "session=wwww"}))
    service.always("GET", "/store/a", Say(body=b"vwxyz"))
    echo = {"runs": [], "echo": {"Authorization": f"Bearer {'q' * 32}", "api_key": "kkkkkkk"}, "url": SECRET, "k": KEY}
    service.always("GET", "/v1/loops/runs", Say(body=echo))
    async with ServiceClient(api_key=KEY, base_url=service.url, request_log=file) as client:
        await client.download_checkpoint("c1", dest_dir=tmp_path / "new")
        await client.control_plane.list_runs()
    text = file.read_text()
    for never in (KEY, SIGNED, "5" * 64, "wwww", "qqqq", "kkkk", "vwxyz"):
        assert never not in text
    places = {line["path"]: line["url"] for line in written(file) if line["kind"] == "request"}
    assert places["/moved"] == f"{service.url}/moved?[REDACTED]"
    moved = next(line for line in written(file) if line.get("status") == 302)
    assert moved["headers"]["Location"] == "/store/a?[REDACTED]"


@pytest.mark.parametrize("bodies", ["short", "full", "none"])
async def test_long_bodies_are_written_as_the_environment_says(
    service: ScriptedService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bodies: str
) -> None:
    monkeypatch.setenv("LOOPS_REQUEST_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("LOOPS_REQUEST_LOG_BODIES", bodies)
    text = "é" * 1990 + KEY + "x" * 40_000
    service.always("GET", "/v1/loops/runs", Say(body={"runs": [], "text": text}))
    async with ServiceClient(api_key=KEY, base_url=service.url) as client:
        await client.control_plane.list_runs()
    body = written(tmp_path / "log")[-1]["body"]
    if bodies == "none":
        assert body is None
    elif bodies == "full":
        assert json.loads(body)["text"] == text.replace(KEY, "[REDACTED]")
    else:
        size = len(json.dumps({"runs": [], "text": text}))
        assert body.startswith(f"{size} B, which begin: {{")
        assert len(body) < 2100
        assert KEY[:4] not in body


async def test_clients_of_one_file_number_their_requests_together(service: ScriptedService, tmp_path: Path) -> None:
    file = tmp_path / "log"
    for _ in range(2):
        async with ServiceClient(api_key=KEY, base_url=service.url, request_log=str(file)):
            pass
    numbers = [line["seq"] for line in written(file)]
    assert len(numbers) == 4
    assert len(set(numbers)) == 2


@pytest.mark.parametrize("place", ["missing/log", "/dev/full"])
async def test_a_log_that_cannot_be_written_is_one_warning_and_ends_nothing_else(
    service: ScriptedService, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    async with ServiceClient(api_key=KEY, base_url=service.url, request_log=tmp_path / place) as client:
        for _ in range(3):
            await client.control_plane.list_runs()
    (warning,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert re.match(r"the request log .* ends here: (FileNotFound|OS)Error", warning)


async def test_a_log_that_cannot_keep_up_ends(
    service: ScriptedService, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "MOST_WAITING", -1)
    async with ServiceClient(api_key=KEY, base_url=service.url, request_log=tmp_path / "log") as client:
        await client.control_plane.list_runs()
    assert "lines are not written yet" in caplog.text


@pytest.mark.parametrize("wrong", ["", 3])
def test_what_is_no_path_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="request_log must be the path of a file"):
        ServiceClient(api_key=KEY, request_log=wrong)


def test_another_word_for_bodies_is_answered_with_the_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOOPS_REQUEST_LOG_BODIES", "long")
    with pytest.raises(ConfigError, match="must be short, full or none; got 'long'"):
        ServiceClient(api_key=KEY, request_log=tmp_path / "log")
