"""The fixtures of `loops_local.pytest`, in tests as its users write them."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

import loops_local.engine.echo
import loops_sync
from tests.support.warnings import TOLERATED

pytest_plugins = ["pytester"]

IMPORTED_BEFORE = (np, loops_local.engine.echo, loops_sync)
"""What a test within a test imports first is removed after it, and these must not be imported twice."""

INI = """
[pytest]
asyncio_mode = {mode}
asyncio_default_fixture_loop_scope = function
addopts = --strict-markers
filterwarnings =
    error
"""

ASYNC = """
import loops_async, pytest

@pytest.fixture(scope="module")
def address(loops_service):
    return loops_service.base_url

@pytest.mark.{runner}
async def test_client(loops_client, address):
    assert isinstance(loops_client, loops_async.ServiceClient)
    sampler = await loops_client.create_sampling_client("any")
    answer = await sampler.sample([104, 105], sampling_params=loops_async.SamplingParams(max_tokens=2))
    assert answer.sequences[0].tokens == [104, 105]

{backend}
"""

BLOCKING = """
import loops_sync

def test_client(loops_client):
    assert isinstance(loops_client, loops_sync.ServiceClient)
    assert loops_client.control_plane.list_runs() == []

def test_faults(loops_client, loops_faults):
    seen = loops_faults.answer("POST */runs", 400, {"error": "no"}, times=2)
    try:
        loops_client.create_lora_training_client("any", rank=8)
    except loops_sync.BadRequestError:
        assert len(seen) == 1

def test_faults_are_forgotten(loops_sync_client):
    loops_sync_client.create_lora_training_client("any", rank=8)

def test_runs_are_deactivated(loops_client):
    [run] = loops_client.control_plane.list_runs()
    assert run.status.name == "INACTIVE"
"""

BACKEND = """
@pytest.fixture
def anyio_backend():
    return "asyncio"
"""

CASSETTE = """
import asyncio, loops_sync, pytest

class TestProgram:
    @pytest.mark.parametrize("name", ["a/b"])
    def test_it(self, loops_cassette, name):
        with loops_sync.ServiceClient({options}) as service:
            assert service.control_plane.list_runs() == []
"""


def run(pytester: pytest.Pytester, *arguments: str, mode: str = "strict") -> pytest.RunResult:
    lines = [f"    default::{name}\n" for name in TOLERATED]
    pytester.makeini(INI.format(mode=mode) + "".join(lines))
    return pytester.runpytest_inprocess("-p", "loops_local.pytest", "-p", "no:randomly", "-p", "no:xdist", *arguments)


def services() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loops-local")]


@pytest.mark.parametrize(("runner", "mode"), [("asyncio", "strict"), ("asyncio", "auto"), ("anyio", "strict")])
def test_asynchronous_tests_have_the_client_of_loops_async(pytester: pytest.Pytester, runner: str, mode: str) -> None:
    pytester.makepyfile(ASYNC.format(runner=runner, backend=BACKEND if runner == "anyio" else ""))

    run(pytester, mode=mode).assert_outcomes(passed=1)


def test_blocking_tests_have_that_of_loops_sync_and_nothing_is_left(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(BLOCKING)
    places = pytester.mkdir("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(places))
    before = services()

    run(pytester).assert_outcomes(passed=4)

    assert not list(places.glob("loops-local-*"))
    assert services() == before


@pytest.mark.torch
def test_a_marker_names_the_engines(imported_engine: None, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.loops_engine("echo", "tiny")
        def test_engine(loops_client, loops_service):
            print("engine", loops_service.engine)
        """
    )

    done = run(pytester, "-s")

    done.assert_outcomes(passed=2)
    done.stdout.fnmatch_lines(["*engine echo*", "*engine torch*"])


def test_an_unknown_engine_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(loops_client): ...")

    done = run(pytester, "-o", "loops_engine=other")

    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*loops_engine must be echo or tiny; got 'other'*"])


def test_a_cassette_is_recorded_once_and_then_replayed(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("import pytest, loops_local")
    options = "base_url=loops_service.base_url, api_key=loops_service.api_key"
    recording = CASSETTE.format(options=options).replace("(self, ", "(self, loops_service, ")
    file = pytester.makepyfile(test_program=recording)
    run(pytester, "--loops-record").assert_outcomes(passed=1)
    file.write_text(CASSETTE.format(options=""))

    run(pytester).assert_outcomes(passed=1)
    [cassette] = Path(pytester.path).rglob("*.jsonl")
    assert cassette.relative_to(pytester.path) == Path("cassettes/test_program/TestProgram.test_it_a_b.jsonl")

    cassette.unlink()
    missing = run(pytester)
    missing.assert_outcomes(errors=1)
    missing.stdout.fnmatch_lines(["*run this test once with --loops-record*"])


def test_without_the_plugin_nothing_changes(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(loops_client): ...")

    pytester.makeini(INI.format(mode="strict"))

    pytester.runpytest_inprocess("-p", "no:randomly").assert_outcomes(errors=1)
