"""Raw HTTP to a service, and engines that misbehave in useful ways."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import aiohttp

from loops_local import LocalService
from loops_local.engine.echo import EchoEngine, EchoTrainer
from tests.support.patience import PATIENCE_SECONDS

MODEL = "some/model"


class Reply(NamedTuple):
    """A whole answer."""

    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Api:
    """Raw requests, with the expected status checked."""

    def __init__(self, local: LocalService, http: aiohttp.ClientSession) -> None:
        self.local = local
        self.http = http

    async def ask(self, method: str, url: str, *, status: int = 200, key: str | None = "", **options: Any) -> Reply:
        """Send a request; `key` replaces the service's, None sends none."""
        url = url if url.startswith("http") else self.local.base_url + url
        headers = dict(options.pop("headers", {}))
        if key is not None:
            headers["Authorization"] = f"Bearer {key or self.local.api_key}"
        async with self.http.request(method, url, headers=headers, **options) as response:
            body = await response.read()
            assert response.status == status, (response.status, body)
            return Reply(response.headers, body)

    async def get(self, url: str, **options: Any) -> Any:
        return (await self.ask("GET", url, **options)).json()

    async def post(self, url: str, body: Any = None, **options: Any) -> Any:
        return (await self.ask("POST", url, json=body, **options)).json()

    async def session(self) -> str:
        return (await self.post("/v1/loops/sessions"))["session"]["id"]

    async def run(self, **fields: Any) -> dict[str, Any]:
        """Make a run and wait until its trainer and sampler are up."""
        fields = {"session_id": fields.pop("session_id", None) or await self.session(), "base_model": MODEL} | fields
        run = (await self.post("/v1/loops/runs", fields))["run"]
        await self.ready(run)
        return run

    async def ready(self, run: dict[str, Any]) -> None:
        await self.until(lambda: self.is_healthy(run["base_url"]))
        await self.sampler_ready(run["sampler"])

    async def sampler_ready(self, sampler: dict[str, Any]) -> None:
        async def is_active() -> bool:
            return await self.sampler_status(sampler) == "ACTIVE"

        await self.until(is_active)

    async def sampler_status(self, sampler: dict[str, Any]) -> str:
        return (await self.get(f"/v1/models/{sampler['model_id']}/deployments/{sampler['deployment_id']}"))["status"]

    async def trainer_status(self, run: dict[str, Any]) -> str:
        return (await self.get(f"/v1/loops/deployments/{run['deployment_id']}"))["deployment"]["status"]["name"]

    async def is_healthy(self, root: str) -> bool:
        async with self.http.get(
            f"{root}/health", headers={"Authorization": f"Bearer {self.local.api_key}"}
        ) as response:
            return response.status == 200

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await condition():  # noqa: ASYNC110 - the other side is a service, which sets no event
                await asyncio.sleep(0.005)

    async def submit(self, root: str, name: str, body: dict[str, Any], **options: Any) -> str:
        """Submit an operation; return its id."""
        response = await self.ask("POST", f"{root}/{name}", json=body, status=202, **options)
        accepted = response.json()
        assert response.headers["Location"] == f"/operations/{accepted['operation_id']}"
        assert accepted["schema_version"] == 1
        return accepted["operation_id"]

    async def poll(self, root: str, operation_id: str, **options: Any) -> dict[str, Any]:
        return await self.get(f"{root}/operations/{operation_id}", **options)

    async def operate(self, run: dict[str, Any] | str, name: str, body: dict[str, Any]) -> Any:
        """Submit an operation and return its result."""
        root = run if isinstance(run, str) else run["base_url"]
        answer = await self.poll(root, await self.submit(root, name, body))
        assert answer["status"] == "done", answer
        return answer["result"]

    async def refused(self, run: dict[str, Any], name: str, body: dict[str, Any]) -> str:
        """Submit an operation that is accepted and fails; return the error."""
        answer = await self.poll(run["base_url"], await self.submit(run["base_url"], name, body))
        assert answer["status"] == "error", answer
        return f"{answer['error_class']}: {answer['error']}"

    async def train(self, run: dict[str, Any] | str, steps: int = 1) -> None:
        for _ in range(steps):
            await self.operate(run, "forward_backward", {"data": [datum(1, 2, 3)]})
            await self.operate(run, "optim_step", {"adam_params": {}})

    async def publish(self, run: dict[str, Any] | str, name: str = "s", *, bump: bool = True) -> dict[str, Any]:
        return await self.operate(run, "save_weights_for_sampler", {"name": name, "bump_version": bump})

    async def sample(
        self, root: str, body: dict[str, Any] | None = None, **options: Any
    ) -> tuple[dict[str, Any], str | None]:
        """Return the first choice, and the version that the header tells."""
        response = await self.ask("POST", f"{root}/sample", json={"prompt": [5, 6, 7], **(body or {})}, **options)
        answer = response.json()
        return answer["choices"][0], response.headers.get("x-trainers-policy-version")

    async def checkpoints(self, run_id: str, **options: Any) -> list[dict[str, Any]]:
        return (await self.get("/v1/loops/checkpoints", params={"run_id": run_id}, **options))["checkpoints"]


def datum(*tokens: int, **inputs: list[float]) -> dict[str, Any]:
    """A training example that predicts each next token."""
    targets = [*tokens[1:], -100]
    tensors = {"target_tokens": {"data": targets, "dtype": "int64", "shape": [len(targets)]}}
    for name, data in inputs.items():
        tensors[name] = {"data": data, "dtype": "float32", "shape": [len(data)]}
    return {"model_input": {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]}, "loss_fn_inputs": tensors}


class Gate:
    """An echo engine whose training operations wait at a gate, and are noted in the order that they pass it."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.waiting = threading.Event()
        self.passed: list[str] = []

    def __call__(self, name: str) -> EchoEngine:
        return _GatedEngine(name, self)

    def open(self) -> None:
        self.gate.set()


class _GatedTrainer(EchoTrainer):
    def __init__(self, rank: int, gate: Gate) -> None:
        super().__init__(rank)
        self._gate = gate

    def forward(self, data: Any, loss_fn: str, config: Any, *, backward: bool, top_k: int = 0) -> Any:
        self._pass(f"rank {self.rank} forward {data[0].model_input.to_ints()[0]}")
        return super().forward(data, loss_fn, config, backward=backward, top_k=top_k)

    def optim_step(self, params: Any) -> dict[str, float]:
        self._pass(f"rank {self.rank} optim")
        return super().optim_step(params)

    def _pass(self, what: str) -> None:
        self._gate.waiting.set()
        assert self._gate.gate.wait(PATIENCE_SECONDS)
        self._gate.passed.append(what)


class _GatedEngine(EchoEngine):
    def __init__(self, name: str, gate: Gate) -> None:
        super().__init__(name)
        self._gate = gate

    def trainer(self, rank: int, seed: int | None = None) -> EchoTrainer:
        return _GatedTrainer(rank, self._gate)
