"""The dashboard over plain HTTP: who may read it, and what its data says."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from loops_local import LocalService
from loops_local._dashboard import routes
from loops_local._resources.activity import MOST_SLICES, Activity
from loops_local._resources.history import MOST_OWN, MOST_POINTS, OUTLINE_POINTS, Curve, RunHistory
from tests.service.api import MODEL, Api, Gate, datum
from tests.support.patience import PATIENCE_SECONDS

DATA = "/dashboard/data"


def token_of(local: LocalService) -> str:
    return URL(local.dashboard_url).fragment.removeprefix("token=")


async def data(api: Api, query: str = "") -> Any:
    return await api.get(DATA + query, key=token_of(api.local))


async def of_run(api: Api, run: Mapping[str, Any]) -> Any:
    (found,) = [row for row in (await data(api))["runs"] if row["id"] == run["id"]]
    return found


async def test_the_page_needs_no_key_loads_nothing_from_elsewhere_and_holds_no_data(api: Api) -> None:
    run = await api.run(name="a-name-of-a-run")
    page = await api.ask("GET", "/dashboard", key=None)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    text = page.body.decode()
    assert run["id"] not in text
    assert "a-name-of-a-run" not in text
    for name, kind in (("script.js", "text/javascript"), ("style.css", "text/css")):
        assert f"dashboard/{name}" in text
        loaded = await api.ask("GET", f"/dashboard/{name}", key=None)
        assert loaded.headers["Content-Type"].startswith(kind)
        assert loaded.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("name", ["data.py", "__init__.py", "..%2f_service.py", "nothing"])
async def test_no_other_file_is_served(api: Api, name: str) -> None:
    url = URL(f"{api.local.base_url}/dashboard/{name}", encoded=True)
    async with api.http.get(url) as reply:
        assert reply.status == 404


async def test_the_data_is_for_the_token_and_for_the_key(api: Api) -> None:
    for key in (None, "wrong", token_of(api.local)[:-1]):
        await api.ask("GET", DATA, status=401, key=key)
    for key in (token_of(api.local), api.local.api_key):
        reply = await api.ask("GET", DATA, key=key)
        assert reply.headers["Cache-Control"] == "no-store"
        assert token_of(api.local) not in reply.body.decode()
        assert api.local.api_key not in reply.body.decode()


async def test_the_token_opens_nothing_else(api: Api) -> None:
    run = await api.run()
    document = await api.get("/openapi.json")
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if path == DATA or operation.get("security") == []:
                continue
            url = path.replace("{run_id}", run["id"]).replace("{", "").replace("}", "")
            await api.ask(method.upper(), url, status=401, key=token_of(api.local))
    await api.ask("POST", DATA, status=401, key=token_of(api.local))


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:80"},
        {"Host": "192.0.2.7"},
        {"Host": "[::"},
        {"Host": ""},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
    ],
    ids=str,
)
async def test_another_host_or_site_is_refused(api: Api, headers: dict[str, str]) -> None:
    for path in ("/dashboard", "/dashboard/script.js", DATA):
        for key in (api.local.api_key, token_of(api.local)):
            await api.ask("GET", path, status=403, key=key, headers=headers)


async def test_the_names_of_this_machine_are_accepted(api: Api) -> None:
    port = URL(api.local.base_url).port
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        headers = {"Host": host, "Origin": f"http://{host}"}
        found = (await api.ask("GET", DATA, key=token_of(api.local), headers=headers)).json()
        assert found["address"] == f"http://{host}"


async def test_the_token_is_private_and_survives_a_restart(http: Any, tmp_path: Path) -> None:
    async with LocalService(engine="echo", data_dir=tmp_path) as local:
        first, path = local.dashboard_url, tmp_path / "dashboard_token"
        assert path.read_text() == token_of(local)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert token_of(local) not in repr(local)
    async with LocalService(engine="echo", data_dir=tmp_path) as local:
        assert URL(local.dashboard_url).fragment == URL(first).fragment


async def test_a_run_shows_how_its_training_goes(api: Api) -> None:
    run = await api.run(name="mine", lora_rank=4)
    assert (await of_run(api, run))["last_loss"] is None
    await api.train(run, steps=3)
    await api.publish(run, "first")
    row = await of_run(api, run)
    assert (row["name"], row["model"], row["rank"], row["status"]) == ("mine", MODEL, 4, "RUNNING")
    assert (row["step"], row["version"], len(row["loss"])) == (3, 3, 3)
    assert row["last_loss"] == pytest.approx(row["loss"][-1], rel=1e-3)
    assert row["tokens_per_second"] > 0
    assert row["used_at"] >= row["created_at"]
    detail = (await data(api, f"?run={run['id']}"))["run"]
    assert detail["row"]["id"] == run["id"]
    assert detail["versions"] == [[3, "first"]]
    curves = {curve["name"]: curve["points"] for curve in detail["curves"]}
    assert [step for step, _ in curves["loss"]] == [1, 2, 3]
    assert curves["grad_norm"] == [[1, 1.0], [2, 1.0], [3, 1.0]]
    await api.post(f"/v1/loops/runs/{run['id']}/deactivate")
    assert (await of_run(api, run))["status"] == "INACTIVE"
    assert (await data(api, "?run=unknown"))["run"] is None


async def test_passes_of_one_step_count_by_their_examples(api: Api) -> None:
    run = await api.run()
    losses = [
        (await api.operate(run, "forward_backward", {"data": examples}))["loss"]
        for examples in ([datum(1, 2, 3)], [datum(7, 200, 9)] * 3)
    ]
    await api.operate(run, "forward", {"data": [datum(50, 60)]})
    await api.operate(run, "optim_step", {"adam_params": {}})
    assert losses[0] != losses[1]
    assert (await of_run(api, run))["last_loss"] == pytest.approx((losses[0] + 3 * losses[1]) / 4)


async def test_a_run_that_returns_to_a_checkpoint_forgets_what_came_after(api: Api) -> None:
    run = await api.run()
    await api.train(run, steps=2)
    saved = await api.operate(run, "save_state", {"name": "two"})
    await api.train(run, steps=2)
    await api.publish(run)
    await api.operate(run, "load_state_with_optimizer", {"path": saved["path"]})
    detail = (await data(api, f"?run={run['id']}"))["run"]
    assert [step for step, _ in detail["curves"][0]["points"]] == [1, 2]
    assert detail["versions"] == []


async def test_a_run_of_local_mode_is_shown(api: Api) -> None:
    root = "/local/trainer"
    await api.operate(root, "init_trainer_server", {"lora_rank": 2, "base_model": MODEL})
    await api.train(root)
    (row,) = (await data(api))["runs"]
    assert (row["local"], row["step"], row["rank"]) == (True, 1, 2)


async def test_samplers_samples_checkpoints_and_the_log_are_shown(api: Api) -> None:
    run = await api.run()
    await api.train(run)
    await api.publish(run, "one")
    await api.operate(run, "save_state", {"name": "kept"})
    for _ in range(3):
        await api.sample(run["sampler"]["base_url"])
    found = await data(api)
    assert found["service"]["engine"] == "echo"
    assert {model["name"] for model in found["models"] if model["loaded"]} == {MODEL}
    assert 0 < found["samples"]["p50"] <= found["samples"]["p95"] < PATIENCE_SECONDS
    (sampler,) = found["samplers"]
    assert (sampler["id"], sampler["of"], sampler["version"]) == (run["sampler"]["id"], f"run {run['id']}", 1)
    assert sampler["used_at"] > 0
    assert found["checkpoints"]["count"] == 2
    assert [each["path"].rsplit("/", 1)[1] for each in found["checkpoints"]["newest"]] == ["kept", "one"]
    assert "save_state done" in found["log"][0]["message"]
    assert found["log"][0]["about"] == f"run {run['id']}"


async def test_secrets_are_taken_out_of_the_log(api: Api) -> None:
    run = await api.run()
    await api.refused(run, "load_state", {"path": f"/{api.local.api_key}/{token_of(api.local)}"})
    text = json.dumps(await data(api))
    assert "[REDACTED]" in text
    assert api.local.api_key not in text
    assert token_of(api.local) not in text


async def test_work_under_way_and_waiting_is_shown(serve: Any) -> None:
    gate = Gate()
    api = await serve(engine=gate)
    run = await api.run()
    try:
        for name, body in (("optim_step", {"adam_params": {}}), ("save_state", {"name": "a"})):
            await api.submit(run["base_url"], name, body)
        await asyncio.to_thread(gate.waiting.wait, PATIENCE_SECONDS)
        work = (await data(api))["work"]
        assert (work["under_way"], work["waiting"]) == (1, 1)
        assert [(each["name"], each["started"]) for each in work["operations"]] == [
            ("optim_step", True),
            ("save_state", False),
        ]
        assert {each["run_id"] for each in work["operations"]} == {run["id"]}
    finally:
        gate.open()


async def test_faults_in_force_are_shown_and_do_not_hit_the_dashboard(api: Api) -> None:
    api.local.faults.answer("*", 502, times=2)
    api.local.faults.delay("POST */sample", 0.5)
    assert (await data(api))["faults"] == [
        {"route": "*", "what": "answer 502", "times": 2},
        {"route": "POST */sample", "what": "delay 0.5 s", "times": 1},
    ]
    await api.ask("GET", "/v1/teams", status=502)
    assert (await data(api))["faults"][0]["times"] == 1
    api.local.faults.clear()
    assert (await data(api))["faults"] == []


# The curves.


def test_a_curve_keeps_its_shape_in_bounded_memory() -> None:
    curve, steps = Curve(), 100_000
    for step in range(1, steps + 1):
        curve.add(step, float(step))
    points = curve.points
    assert MOST_POINTS / 2 <= len(points) <= MOST_POINTS
    assert (points[-1][0], curve.last) == (steps, float(steps))
    width = points[1][0] - points[0][0]
    for step, value in points[:-1]:
        assert value == pytest.approx(step - (width - 1) / 2), "the mean of the steps that it stands for"
    assert len(curve.outline) <= OUTLINE_POINTS
    assert curve.outline[0] < curve.outline[-1]


def test_a_curve_that_is_cut_continues() -> None:
    curve = Curve()
    for step in range(1, 1001):
        curve.add(step, 1.0)
    curve.cut(500)
    curve.add(501, 3.0)
    assert curve.points[-2][0] <= 500
    assert curve.points[-1] == (501, 3.0)
    curve.cut(0)
    assert (curve.points, curve.last, curve.outline) == ([], None, [])


def test_own_metrics_are_bounded() -> None:
    history = RunHistory()
    for step in range(1, 3):
        history.add_own(step, {f"metric-{number}": 1.0 for number in range(2 * MOST_OWN)})
    assert len(history.own) == MOST_OWN
    assert all(len(curve.points) == 2 for curve in history.own.values())


# Metrics of the caller's own.


async def test_own_metrics_are_added_once_also_when_they_are_sent_again(api: Api) -> None:
    run = await api.run()
    for steps in (
        [{"step": 1, "metrics": {"reward": 0.5}}],
        [{"step": n, "metrics": {"reward": n / 2}} for n in (1, 2)],
    ):
        assert await api.post(f"{run['base_url']}/metrics", {"steps": steps}) == {"steps": len(steps)}
    (curve,) = (await data(api, f"?run={run['id']}"))["run"]["own"]
    assert (curve["name"], curve["points"], curve["last"]) == ("reward", [[1, 0.5], [2, 1.0]], 1.0)


@pytest.mark.parametrize(
    "body", [{}, {"steps": [{"step": 0, "metrics": {}}]}, {"steps": [{"step": 1, "metrics": {"a": "b"}}]}]
)
async def test_own_metrics_that_are_none_are_refused(api: Api, body: Any) -> None:
    run = await api.run()
    await api.post(f"{run['base_url']}/metrics", body, status=422)


# Figures over time.


async def test_the_service_measures_when_no_page_is_open(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "SLICE_SECONDS", 0.01)
    api = await serve()
    run = await api.run()
    await api.sample(run["sampler"]["base_url"])

    async def is_measured() -> bool:
        found = await data(api)
        return found["samples"]["per_second"] > 0 and any(one["samples_per_second"] > 0 for one in found["slices"])

    await api.until(is_measured)


def test_a_slice_has_the_samples_that_ended_in_it() -> None:
    activity = Activity()
    for _ in range(3):
        with activity.sample():
            assert activity.samples_under_way == 1
    with pytest.raises(ZeroDivisionError), activity.sample():
        _ = 1 / 0
    activity.measure(2, 5)
    activity.measure(0, 0)
    first, second = activity.slices
    assert first.samples_per_second > 0 == second.samples_per_second
    assert first.p50 is not None
    assert second.p50 is None
    assert (first.under_way, first.waiting, activity.samples, activity.samples_under_way) == (2, 5, 3, 0)


def test_figures_over_time_are_bounded() -> None:
    activity = Activity()
    for _ in range(2 * MOST_SLICES):
        activity.measure(0, 0)
    assert len(activity.slices) == MOST_SLICES
