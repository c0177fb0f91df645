"""The fault proxy: what each fault does to a request, when it happens, and what is counted."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from loops_local.faults import (
    Answer,
    Delay,
    Drop,
    Duplicate,
    Fault,
    FaultProxy,
    LoseAnswer,
    Refuse,
    Stall,
    Truncate,
    proxy_in_thread,
    read_plan,
)
from tests.support.patience import PATIENCE_SECONDS

BODY = b"x" * 100_000


class Service:
    """Counts what it executed, and says its own URL."""

    def __init__(self) -> None:
        self.url = ""
        self.executed = 0
        self.bodies: list[bytes] = []
        self.paths: list[str] = []

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.executed += 1
        self.bodies.append(await request.content.read())
        self.paths.append(request.raw_path)
        if request.path == "/json":
            return web.json_response({"url": f"{self.url}/there"}, headers={"X-Kind": "json"})
        return web.Response(body=BODY)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service()
    runner = web.ServerRunner(web.Server(service.handle, access_log=None), shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    service.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield service
    await runner.cleanup()


class Caller:
    def __init__(self, proxy: FaultProxy, session: aiohttp.ClientSession) -> None:
        self.proxy = proxy
        self._session = session

    async def ask(self, path: str = "/file", method: str = "POST", body: bytes = b"hello") -> tuple[int, bytes]:
        async with self._session.request(method, self.proxy.base_url + path, data=body) as answer:
            return answer.status, await answer.read()

    async def outcome(self, path: str = "/file", method: str = "POST") -> str:
        try:
            return str((await self.ask(path, method))[0])
        except aiohttp.ClientError as error:
            return type(error).__name__


@asynccontextmanager
async def proxied(service: Service, *plan: Fault, seed: int = 1) -> AsyncIterator[Caller]:
    async with FaultProxy(to=service.url, plan=plan, seed=seed) as proxy, aiohttp.ClientSession() as session:
        yield Caller(proxy, session)


async def test_without_a_fault_everything_is_passed_on(service: Service) -> None:
    async with proxied(service) as caller:
        assert await caller.ask("/file%2Fa?b=c%20d") == (200, BODY)
        assert (service.bodies, service.paths) == ([b"hello"], ["/file%2Fa?b=c%20d"])
        assert caller.proxy.counts.requests == 1


async def test_urls_in_answers_lead_through_the_proxy(service: Service) -> None:
    async with proxied(service) as caller:
        _, body = await caller.ask("/json")
        assert json.loads(body) == {"url": f"{caller.proxy.base_url}/there"}


@pytest.mark.parametrize(
    ("fault", "outcome", "executed"),
    [
        (Drop(), "ClientOSError", 0),
        (LoseAnswer(), "ClientOSError", 1),
        (Truncate(), "ClientPayloadError", 1),
        (Truncate(share=0.0), "ClientPayloadError", 1),
        (Stall(seconds=0.05), "ClientOSError", 0),
        (Stall(seconds=0.05, executed=True), "ClientOSError", 1),
        (Delay(seconds=0.01), "200", 1),
        (Answer(status=504), "504", 0),
        (Answer(status=504, executed=True), "504", 1),
        (Duplicate(), "200", 2),
        (Refuse(seconds=0.1), "ClientOSError", 0),
    ],
)
async def test_each_fault(service: Service, fault: Fault, outcome: str, executed: int) -> None:
    async with proxied(service, fault) as caller:
        assert await caller.outcome() == outcome
        assert service.executed == executed
        (rule,) = caller.proxy.counts.rules
        assert (rule.requests, rule.happened) == (1, 1)
        assert caller.proxy.counts.faults == {rule.fault: 1}


async def test_an_answer_has_the_headers_and_the_body_of_the_plan(service: Service) -> None:
    html = Answer(route="* /file", status=429, headers={"Retry-After": "nan"}, body="<html>", times=1)
    async with proxied(service, html, Answer(body={"a": 1})) as caller, aiohttp.ClientSession() as session:
        async with session.get(f"{caller.proxy.base_url}/file") as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "nan")
            assert (answer.content_type, await answer.text()) == ("text/html", "<html>")
        async with session.get(f"{caller.proxy.base_url}/file") as answer:
            assert (answer.status, await answer.json()) == (503, {"a": 1})


async def test_connections_are_refused_for_a_while_and_the_port_is_kept(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, over, sleep = 7777.0, asyncio.Event(), asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda pause: over.wait() if pause == seconds else sleep(pause))
    async with proxied(service, Refuse(seconds=seconds, nth=[2])) as caller:
        url = caller.proxy.base_url
        assert await caller.outcome() == "200"
        assert await caller.outcome() == "ClientOSError"
        assert await caller.outcome() == "ClientConnectorError"
        over.set()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await caller.outcome() != "200":
                pass
        assert caller.proxy.base_url == url


@pytest.mark.parametrize(
    ("fault", "hit"),
    [
        (Answer(nth=[2, 5]), [2, 5]),
        (Answer(every=3), [3, 6, 9]),
        (Answer(every=2, times=2), [2, 4]),
        (Answer(window=(0, 60), nth=[1]), [1]),
        (Answer(window=(60, 90)), []),
        (Answer(probability=0.0), []),
        (Answer(route="GET *"), []),
        (Answer(route="POST /f*e", nth=[9]), [9]),
    ],
)
async def test_when_a_fault_happens(service: Service, fault: Fault, hit: list[int]) -> None:
    async with proxied(service, fault) as caller:
        outcomes = [await caller.outcome() for _ in range(9)]
        assert [number for number, outcome in enumerate(outcomes, 1) if outcome == "503"] == hit


async def test_the_same_seed_decides_the_same_whatever_else_is_asked(service: Service) -> None:
    async def hits(seed: int, *, other: int) -> list[str]:
        plan = Answer(route="* /none", probability=0.5), Answer(route="* /file", probability=0.5)
        async with proxied(service, *plan, seed=seed) as caller:
            for _ in range(other):
                await caller.outcome("/none")
            return [await caller.outcome() for _ in range(20)]

    first = await hits(1, other=0)
    assert {"200", "503"} == set(first)
    assert await hits(1, other=7) == first
    assert await hits(2, other=0) != first


async def test_the_counts_are_readable_over_http(service: Service) -> None:
    async with proxied(service, Drop(route="POST */file", every=2)) as caller:
        for _ in range(4):
            await caller.outcome()
        _, body = await caller.ask("/-/faults", "GET")
        counts = json.loads(body)
        assert counts["rules"] == [{"fault": "drop", "route": "POST */file", "requests": 4, "happened": 2}]
        assert (counts["seed"], counts["requests"], counts["faults"]) == (1, 4, {"drop": 2})


async def test_a_service_that_is_not_there_is_said(service: Service) -> None:
    async with FaultProxy(to="http://127.0.0.1:9", plan=[]) as proxy, aiohttp.ClientSession() as session:
        status, body = await Caller(proxy, session).ask()
        assert status == 502
        assert b"the fault proxy got no answer from http://127.0.0.1:9" in body


def test_it_runs_in_a_thread_for_blocking_programs() -> None:
    with proxy_in_thread(to="http://127.0.0.1:9", plan=[Answer(status=418)]) as proxy:

        async def ask() -> int:
            async with aiohttp.ClientSession() as session:
                return (await Caller(proxy, session).ask())[0]

        assert asyncio.run(ask()) == 418


def test_what_it_stands_before_must_be_a_url() -> None:
    with pytest.raises(ValueError, match="absolute http or https URL"):
        FaultProxy(to="localhost:8000", plan=[])


@pytest.mark.parametrize("to", ["http://user:5ecret@127.0.0.1:1", "http://127.0.0.1:1?a=5ecret", "http://h/#5ecret"])
def test_what_it_stands_before_is_shown_so_it_has_no_secret(to: str) -> None:
    with pytest.raises(ValueError, match="must not contain a user, a query or a fragment") as refused:
        FaultProxy(to=to, plan=[])
    assert "5ecret" not in str(refused.value)


TOML = """
[[faults]]
fault = "answer"
route = "POST */sample"
status = 504
executed = true
headers = { Retry-After = "1" }
probability = 0.5

[[faults]]
fault = "drop"
nth = [1, 2]
window = [5, 60]
"""
PLAN = [
    Answer(route="POST */sample", status=504, executed=True, headers={"Retry-After": "1"}, probability=0.5),
    Drop(nth=[1, 2], window=(5.0, 60.0)),
]


def test_a_plan_is_read_from_toml_and_json(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(TOML)
    (tmp_path / "plan.json").write_text('{"faults": [{"fault": "stall", "seconds": 2}]}')
    assert read_plan(tmp_path / "plan.toml") == PLAN
    assert read_plan(tmp_path / "plan.json") == [Stall(seconds=2.0)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[faults]]\nfault = 'melt'", r"Invalid value 'melt' - at `\$.faults\[0\].fault`"),
        ("[[faults]]\nfault = 'drop'\nstatus = 500", "unknown field `status`"),
        ("[[faults]]\nfault = 'drop'\nprobability = 2", "<= 1"),
        ("[[faults]]\nfault = 'drop'\nevery = 0", ">= 1"),
        (
            "[[faults]]\nfault = 'drop'\nroute = 'sample'",
            "route must be a pattern of .METHOD /path.*; got 'sample' - at",
        ),
        ("[[faults]]\nfault = 'drop'\nwindow = [5, 1]", r"window must begin before it ends; got \[5.0, 1.0\]"),
        ("[[faults]]\nfault = 'answer'\nroute = 'a'", "route must be a pattern"),
        (
            '[[faults]]\nfault = "answer"\nheaders = { X = "a\\r\\nb" }',
            "headers must be of printable characters; got 'X'",
        ),
        ("[[faults", "Expected ']]'"),
        ("", "missing required field `faults`"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_place(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"plan.toml: .*{problem}"):
        read_plan(file)


async def test_the_command_prints_its_counts_at_the_end(service: Service, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(TOML)
    command = (sys.executable, "-m", "loops_local", "faults", "--to", service.url, "--seed", "7")
    process = await asyncio.create_subprocess_exec(
        *command, "--plan", str(tmp_path / "plan.toml"), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    said = (await process.stdout.readuntil(b"Press Ctrl-C to stop.\n")).decode()
    (url,) = re.findall(r"injected at (\S+)", said)
    assert "seed    7" in said
    async with aiohttp.request("GET", f"{url}/file") as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGINT)
    rest, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert json.loads(rest)["requests"] == 1


async def test_a_plan_that_is_not_there_is_one_readable_line(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "loops_local", "faults", "--to", "http://127.0.0.1:9", "--plan")
    process = await asyncio.create_subprocess_exec(*command, str(tmp_path / "none"), stderr=asyncio.subprocess.PIPE)
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors.decode().startswith("loops-local: cannot start: [Errno 2] No such file or directory")
