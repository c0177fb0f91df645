from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp

from loops_local import LocalService
from tests.service.api import MODEL, Api, datum

KEY = "a-key-of-ours"


async def test_a_closed_service_goes_on_where_it_was(http: aiohttp.ClientSession, tmp_path: Path) -> None:
    async with serving(tmp_path) as local:
        api = Api(local, http)
        run = await api.run(lora_rank=8)
        await api.train(run, 2)
        await api.publish(run)
        operation = await api.submit(run["base_url"], "optim_step", {"adam_params": {}})
        answer = await api.poll(run["base_url"], operation)
        before = await everything(api, run)
        key = local.api_key
    async with serving(tmp_path) as local:
        api = Api(local, http)
        assert local.api_key == key
        assert await everything(api, run) == before
        root = f"{local.base_url}/trainers/{run['id']}"
        assert await api.poll(root, operation) == answer
        assert await api.get(f"{root}/policy_version") == {"policy_version": 3}
        await api.until(lambda: api.is_healthy(root))
        await api.train(root)
        assert await api.get(f"{root}/policy_version") == {"policy_version": 4}
        _, version = await api.sample(f"{local.base_url}/samplers/{run['sampler']['id']}/sync")
        assert version == "2"


async def test_gradients_survive_a_restart_before_the_step(http: aiohttp.ClientSession, tmp_path: Path) -> None:
    async with serving(tmp_path) as local:
        api = Api(local, http)
        run = await api.run()
        await api.train(run)
        await api.operate(run, "forward_backward", {"data": [datum(1, 2, 3)] * 7})
    for expected in (7, 0):
        async with serving(tmp_path) as local:
            root = f"{local.base_url}/trainers/{run['id']}"
            stepped = await Api(local, http).operate(root, "optim_step", {"adam_params": {}})
            assert stepped["metrics"]["grad_norm"] == expected
            assert stepped["metrics"]["backward_passes"] == bool(expected)


def serving(data_dir: Path) -> LocalService:
    return LocalService(engine="echo", data_dir=data_dir, provisioning_seconds=0)


async def everything(api: Api, run: dict[str, Any]) -> Any:
    """What the control plane tells, without addresses and states, which change with a restart."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key not in ("base_url", "status")}
        return [plain(item) for item in value] if isinstance(value, list) else value

    urls = (
        f"/v1/loops/sessions/{run['session_id']}",
        "/v1/loops/runs",
        "/v1/loops/samplers",
        "/v1/loops/deployments",
        f"/v1/loops/checkpoints?run_id={run['id']}",
    )
    return [plain(await api.get(url)) for url in urls]


class Killable:
    """A service in a process of its own, for killing."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.base_url = ""
        self.api_key = KEY

    async def __aenter__(self) -> Killable:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loops_local", "serve", "--engine", "echo", "--port", "0"),
            *("--provisioning-seconds", "0", "--data-dir", str(self.data_dir)),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "BASETEN_API_KEY": KEY},
        )
        assert self._process.stdout is not None
        self.base_url = (await self._process.stdout.readline()).decode().split()[-1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGKILL)
        await self._process.communicate()


async def test_a_killed_service_has_everything_that_was_saved_and_owns_up_to_the_rest(
    http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    async with Killable(tmp_path) as killed:
        api = Api(killed, http)  # type: ignore[arg-type]  # it has the two attributes that matter
        run = await api.run(lora_rank=8)
        await api.train(run, 2)
        path = (await api.operate(run, "save_state", {"name": "two"}))["path"]
        await api.publish(run)
        operation = await api.submit(run["base_url"], "optim_step", {"adam_params": {}})
        answer = await api.poll(run["base_url"], operation)
        idle = await api.run()
        before = await everything(api, run)
        leftover = tmp_path / "checkpoints" / run["id"] / "half-written"
        leftover.mkdir()
    async with LocalService(engine="echo", data_dir=tmp_path, api_key=KEY, provisioning_seconds=0) as local:
        api = Api(local, http)
        assert await everything(api, run) == before
        assert not leftover.exists()
        root = f"{local.base_url}/trainers/{run['id']}"
        moved = run | {"base_url": root}
        assert await api.poll(root, operation) == answer
        assert (
            await api.submit(root, "optim_step", {"adam_params": {}}, headers={"Idempotency-Key": operation})
            == operation
        )
        _, version = await api.sample(f"{local.base_url}/samplers/{run['sampler']['id']}/sync")
        assert version == "2"
        lost = await api.refused(moved, "optim_step", {"adam_params": {}})
        assert lost.startswith("LostWeightsError")
        assert await api.operate(moved, "load_state_with_optimizer", {"path": path}) == {"step": 2}
        await api.train(moved)
        await api.train(f"{local.base_url}/trainers/{idle['id']}")


async def test_a_run_that_lost_its_weights_may_begin_again(http: aiohttp.ClientSession, tmp_path: Path) -> None:
    async with Killable(tmp_path) as killed:
        api = Api(killed, http)  # type: ignore[arg-type]  # it has the two attributes that matter
        run = await api.run()
        await api.train(run)
    async with serving(tmp_path) as local:
        root = f"{local.base_url}/trainers/{run['id']}"
        api = Api(local, http)
        await api.operate(root, "init_trainer_server", {"lora_rank": 4, "base_model": MODEL})
        await api.train(root)
