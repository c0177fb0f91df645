"""What atheris runs: bytes become an answer, and a call of the client reads it. Started by `guided`."""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import atheris

with atheris.instrument_imports(include=["loops_async"]):
    import loops_async as loops

import aiohttp
from multidict import CIMultiDict

from loops_local import LocalService

# Only what is not asked again: a pause would take longer than thousands of inputs.
STATUSES = (200, 202, 200, 202, 400, 401, 403, 404, 409, 422)
HEADERS = ("Content-Type", "x-trainers-policy-version", "X-Request-Id", "Retry-After")


class FakeResponse:
    """As much of aiohttp's response as a client reads of an answer that is not streamed."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = CIMultiDict(headers)
        self.content_type = "application/json"
        self.content_length = len(body)
        self.content = SimpleNamespace(total_bytes=len(body))
        self._body = body

    async def read(self) -> bytes:
        return self._body

    def release(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    async def __aenter__(self) -> FakeResponse:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Do nothing."""


class Target:
    """Makes each input the answer to one call."""

    def __init__(self, corpus: Path) -> None:
        self._runner = asyncio.Runner()
        self._answer: FakeResponse | None = None
        self._found: set[str] = set()
        self._seen: list[bytes] = []
        self._runner.run(self._open())
        self._runner.run(self._write(corpus))

    def __call__(self, data: bytes) -> None:
        """Run one input: call, status, header, length of its value, the value, and the body."""
        call_at, status_at, header_at, length, *_ = data[:4].ljust(4, b"\0")
        call = self._calls[call_at % len(self._calls)]
        status = STATUSES[status_at % len(STATUSES)]
        headers = {"Content-Type": "application/json"}
        if header_at:
            headers[HEADERS[header_at % len(HEADERS)]] = data[4 : 4 + length].decode("latin-1")
        body = data[4 + length :]
        self._answer = FakeResponse(status, headers, body)
        try:
            self._runner.run(asyncio.wait_for(call(), 2))
        except (loops.LoopsError, TimeoutError):
            pass
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            if kind not in self._found:
                self._found.add(kind)
                print(f"UNTYPED {kind}: {status} {headers} {body!r:.500}", flush=True)
        finally:
            self._answer = None

    async def _open(self) -> None:
        """Open the clients on a true service; afterwards, nothing is sent any more."""
        self._local = LocalService(engine="echo", provisioning_seconds=0.0)
        await self._local.__aenter__()
        self._service = await loops.ServiceClient(base_url=self._local.base_url, api_key=self._local.api_key).open()
        trainer = await self._service.create_lora_training_client("echo")
        sampler = await trainer.save_weights_and_get_sampling_client("a")
        plane = self._service.control_plane
        run_id, deployment_id = trainer.run_id, str(trainer.run.deployment_id)
        (checkpoint,) = await trainer.list_checkpoints()
        self._calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: sampler.sample([1, 2], 1, None, True, 1),
            lambda: sampler.sample([1, 2]),
            self._service.get_server_capabilities,
            lambda: plane.get_run(run_id),
            plane.list_runs,
            lambda: plane.list_checkpoints(run_id=run_id),
            lambda: plane.get_checkpoint_files(checkpoint.id),
            plane.list_deployments,
            lambda: plane.get_deployment_logs(deployment_id),
            lambda: plane.get_deployment_metrics(deployment_id),
            trainer.policy_version,
        ]
        self._patch()

    async def _write(self, corpus: Path) -> None:
        """Begin with the true answers."""
        for number, call in enumerate(self._calls):
            self._seen.clear()
            await call()
            (corpus / str(number)).write_bytes(bytes((number, 0, 0, 0)) + self._seen[-1])

    def _patch(self) -> None:
        true = aiohttp.ClientSession._request

        async def request(session: Any, *arguments: Any, **options: Any) -> Any:
            if self._answer is not None:
                return self._answer
            answer = await true(session, *arguments, **options)
            self._seen.append(await answer.read())
            return answer

        aiohttp.ClientSession._request = request  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    atheris.Setup(sys.argv, Target(Path(sys.argv[-1])))
    atheris.Fuzz()
