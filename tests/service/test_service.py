from __future__ import annotations

import threading
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from loops_local import LocalService, StoreLockedError, serve_in_thread
from loops_local.engine import RefusedError, load_engine
from tests.service.api import Api


async def test_a_service_without_a_data_directory_leaves_nothing_behind() -> None:
    local = LocalService(engine="echo")
    async with local:
        directory = local.data_dir
        assert (directory / "store.sqlite3").exists()
    assert not directory.exists()
    with pytest.raises(RuntimeError, match="not running"):
        _ = local.base_url


async def test_repr_hides_the_key() -> None:
    async with LocalService(engine="echo", api_key="very-secret") as local:
        assert "very-secret" not in repr(local)
        assert local.base_url in repr(local)


@pytest.mark.parametrize(
    "options", [{"engine": "tpu"}, {"model": "a", "models": ["b"]}, {"models": []}, {"engine": "torch", "models": []}]
)
def test_bad_arguments_are_refused_when_they_are_given(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"engine|model"):
        LocalService(**options)


async def test_one_data_directory_has_one_service(tmp_path: Path) -> None:
    async with LocalService(engine="echo", data_dir=tmp_path):
        with pytest.raises(StoreLockedError):
            await LocalService(engine="echo", data_dir=tmp_path).__aenter__()
    async with LocalService(engine="echo", data_dir=tmp_path):
        pass


async def test_a_failed_start_leaves_no_thread(tmp_path: Path) -> None:
    async with LocalService(engine="echo") as local:
        port = int(local.base_url.rsplit(":", 1)[1])
        before = set(threading.enumerate())
        with pytest.raises(OSError, match="in use"):
            await LocalService(engine="echo", port=port, data_dir=tmp_path).__aenter__()
        started = {thread.name for thread in set(threading.enumerate()) - before}
        assert {name for name in started if not name.startswith("asyncio")} == set(), "the loop keeps its own workers"


def test_in_a_thread_for_blocking_code() -> None:
    before = set(threading.enumerate())
    with serve_in_thread(engine="echo") as local:
        request = urllib.request.Request(
            f"{local.base_url}/v1/loops/capabilities", headers={"Authorization": f"Bearer {local.api_key}"}
        )
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
    assert set(threading.enumerate()) <= before


def test_in_a_thread_a_failed_start_is_told() -> None:
    with pytest.raises(OSError), serve_in_thread(engine="echo", host="256.0.0.1"):  # noqa: PT011 - any kind of it
        pytest.fail("it cannot start")


def test_unknown_kind_of_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="torch, echo"):
        load_engine("tpu", "x", cache_dir=tmp_path)


# Faults on demand.


async def test_faults_hit_the_next_requests_that_fit_and_no_others(api: Api) -> None:
    api.local.faults.answer("GET */capabilities", 502, {"error": "no"}, headers={"Retry-After": "1"}, times=2)
    await api.get("/v1/loops/runs")
    for _ in range(2):
        response = await api.ask("GET", "/v1/loops/capabilities", status=502)
        assert response.headers["Retry-After"] == "1"
    await api.get("/v1/loops/capabilities")


async def test_a_dropped_request_is_not_done_and_a_lost_answer_is(api: Api) -> None:
    session = await api.session()
    body = {"session_id": session, "base_model": "m"}
    api.local.faults.drop("POST /v1/loops/runs")
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await api.post("/v1/loops/runs", body)
    assert (await api.get("/v1/loops/runs"))["runs"] == []
    api.local.faults.lose_answer("POST /v1/loops/runs")
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await api.post("/v1/loops/runs", body)
    assert len((await api.get("/v1/loops/runs"))["runs"]) == 1


async def test_a_delay_and_forgetting_faults(api: Api) -> None:
    api.local.faults.delay("GET */capabilities", 30, times=5)
    with pytest.raises(TimeoutError):
        await api.get("/v1/loops/capabilities", timeout=aiohttp.ClientTimeout(0.05))
    api.local.faults.clear()
    await api.get("/v1/loops/capabilities")


async def test_a_mistake_of_ours_is_a_500_that_can_be_read(api: Api, caplog: Any, monkeypatch: Any) -> None:
    from loops_local._resources.registry import Registry

    monkeypatch.setattr(Registry, "runs", lambda _self: 1 / 0)
    error = await api.get("/v1/loops/runs", status=500)
    assert error["code"] == "INTERNAL_ERROR"
    assert "ZeroDivisionError" in caplog.text
