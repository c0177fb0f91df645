from __future__ import annotations

import threading
from typing import Any

from loops_local.engine import RefusedError
from loops_local.engine.echo import EchoEngine
from tests.service.api import MODEL, Api
from tests.service.conftest import TimePasses
from tests.support.patience import PATIENCE_SECONDS


async def create(api: Api, **fields: Any) -> dict[str, Any]:
    body = {"session_id": await api.session(), "base_model": MODEL} | fields
    return (await api.post("/v1/loops/runs", body))["run"]


async def test_trainer_and_sampler_go_through_the_real_states(serve: Any, time_passes: TimePasses) -> None:
    api = await serve(provisioning_seconds=600.0)
    run = await create(api)
    for trainer, sampler in [("CREATED", "BUILDING"), ("CREATED", "DEPLOYING"), ("DEPLOYING", "LOADING_MODEL")]:
        assert (await api.trainer_status(run), await api.sampler_status(run["sampler"])) == (trainer, sampler)
        time_passes(220.0)
    await api.ready(run)
    assert await api.trainer_status(run) == "RUNNING"


async def test_until_then_requests_are_turned_away_for_now(serve: Any) -> None:
    api = await serve(provisioning_seconds=30)
    run = await create(api)
    error = await api.get(f"{run['base_url']}/health", status=503)
    assert "deploying" in error["error"]
    for url, body in (
        (f"{run['base_url']}/optim_step", {"adam_params": {}}),
        (f"{run['sampler']['base_url']}/sample", {"prompt": [1]}),
    ):
        response = await api.ask("POST", url, json=body, status=400)
        assert "deploying" in response.json()["error"]
        assert "X-Baseten-Error-Source" not in response.headers, "clients repeat it"


async def test_a_model_that_takes_long_keeps_them_loading(serve: Any) -> None:
    loaded = threading.Event()

    def slow(name: str) -> EchoEngine:
        assert loaded.wait(PATIENCE_SECONDS)
        return EchoEngine(name)

    api = await serve(engine=slow)
    run = await create(api)
    assert await api.trainer_status(run) == "DEPLOYING"
    assert await api.sampler_status(run["sampler"]) == "LOADING_MODEL"
    loaded.set()
    await api.ready(run)


async def test_a_model_is_loaded_once_for_all_runs(serve: Any) -> None:
    loads: list[str] = []

    def counting(name: str) -> EchoEngine:
        loads.append(name)
        return EchoEngine(name)

    api = await serve(engine=counting)
    for model in ("a", "a", "b"):
        await api.run(base_model=model)
    assert loads == ["a", "b"]


async def test_a_model_that_does_not_load_fails_the_deployment_with_the_reason(serve: Any) -> None:
    problems = [RefusedError("no such weights")]

    def failing(name: str) -> EchoEngine:
        if problems:
            raise problems.pop()
        return EchoEngine(name)

    api = await serve(engine=failing)
    run = await create(api)

    async def has_failed() -> bool:
        return await api.trainer_status(run) == "FAILED"

    await api.until(has_failed)
    assert await api.sampler_status(run["sampler"]) == "DEPLOY_FAILED"
    response = await api.ask("GET", f"{run['base_url']}/health", status=400)
    assert "no such weights" in response.json()["error"]
    assert response.headers["X-Baseten-Error-Source"] == "06", "clients stop waiting"
    again = await api.run()
    assert await api.trainer_status(again) == "RUNNING", "the next run tries to load it again"
    assert await api.trainer_status(run) == "FAILED"


async def test_what_is_not_used_sleeps_and_wakes_when_it_is(serve: Any, time_passes: TimePasses) -> None:
    api = await serve()
    run = await api.run(scale_down_delay_seconds=60)
    time_passes(61.0)
    assert await api.trainer_status(run) == "SCALED_TO_ZERO"
    assert await api.sampler_status(run["sampler"]) == "SCALED_TO_ZERO"
    await api.ask("POST", run["sampler"]["base_url"].removesuffix("/sync") + "/wake", status=202)
    await api.sampler_ready(run["sampler"])
    assert await api.trainer_status(run) == "SCALED_TO_ZERO"
    await api.train(run)
    assert await api.trainer_status(run) == "RUNNING"
    time_passes(139.0)
    assert await api.sampler_status(run["sampler"]) == "SCALED_TO_ZERO"
    await api.sample(run["sampler"]["base_url"])
    assert await api.sampler_status(run["sampler"]) == "ACTIVE"


async def test_a_health_check_keeps_a_trainer_awake_and_its_weights_survive_sleep(
    serve: Any, time_passes: TimePasses
) -> None:
    api = await serve()
    run = await api.run(scale_down_delay_seconds=6000)
    await api.train(run)
    for _ in range(2):
        time_passes(5000.0)
        assert await api.is_healthy(run["base_url"])
    time_passes(5900.0)
    assert await api.trainer_status(run) == "RUNNING"
    time_passes(100.0)
    assert await api.trainer_status(run) == "SCALED_TO_ZERO"
    await api.train(run)
    assert await api.get(f"{run['base_url']}/policy_version") == {"policy_version": 2}
