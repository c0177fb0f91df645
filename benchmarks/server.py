"""A service that is faster than any client: precomputed answers on a bare protocol.

Run as ``python -m benchmarks.server --port N``; the harness pins it to its own core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

PROMPT_TOKENS = 512
COMPLETION_TOKENS = 256
CREATED_AT = "2026-06-24T18:02:11Z"

Reply = tuple[int, bytes, float]
"""Status, body, and the delay in seconds."""


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def completion(samples: int, *, with_ids: bool) -> bytes:
    """Return the answer to a sample: completions of 256 tokens with logprobs, as strings and perhaps as ids."""
    random.seed(0)
    choices = []
    for index in range(samples):
        tokens = [random.randrange(49_152) for _ in range(COMPLETION_TOKENS)]
        choices.append(
            {
                "index": index,
                "text": "lorem " * 150,
                "finish_reason": "length",
                "logprobs": {
                    "tokens": [f"token_id:{token}" for token in tokens],
                    "token_logprobs": [-3.0 * random.random() for _ in tokens],
                },
            }
            | ({"token_ids": tokens} if with_ids else {})
        )
    return _json({"choices": choices})


class Answers:
    """The routes that the benchmarks use, in the formats of older and newer services."""

    def __init__(
        self, base_url: str, *, sample_seconds: float, ready_seconds: float, samples: int, with_ids: bool
    ) -> None:
        self._base_url = base_url
        self._sample_seconds = sample_seconds
        self._ready_seconds = ready_seconds
        self._completion = completion(samples, with_ids=with_ids)
        self._ready_at: dict[str, float] = {}
        self._operations = 0

    def reply(self, method: str, target: str) -> Reply:
        parts = urlsplit(target)
        steps = parts.path.strip("/").split("/")
        if steps[-1] == "sample":
            return 200, self._completion, self._sample_seconds
        if steps[:2] == ["v1", "loops"]:
            return self._control_plane(method, steps[2:], parts.query)
        if steps[0] == "trainers":
            return self._trainer(steps)
        if steps[:2] == ["v1", "models"]:
            return 200, _json({"id": "d", "status": "ACTIVE"}), 0.0
        if steps[-2:] == ["v1", "models"]:
            return 200, _json({"data": [{"id": "bench", "parent": None}]}), 0.0
        if steps[-1] == "trainers_policy_version":
            return 200, _json({"policy_version": 1}), 0.0
        return 404, _json({"code": "NOT_FOUND", "message": f"the benchmark has no route {target}"}), 0.0

    def _control_plane(self, method: str, steps: list[str], query: str) -> Reply:
        if steps == ["sessions"]:
            return 200, _json({"session": {"id": "bench"}}), 0.0
        if steps in (["runs"], ["trainers"]) and method == "POST":
            return 200, _json({"run": self._new_run()}), 0.0
        if steps == ["samplers"] and method == "POST":
            return 200, _json({"sampler": self._sampler()}), 0.0
        if steps == ["checkpoints"]:
            run_id = parse_qs(query)["run_id"][0]
            return 200, _json({"checkpoints": [_checkpoint(run_id, n) for n in range(10)]}), 0.0
        return 404, _json({"code": "NOT_FOUND", "message": "/".join(steps)}), 0.0

    def _new_run(self) -> dict[str, object]:
        run_id = f"run{len(self._ready_at)}"
        self._ready_at[run_id] = time.monotonic() + self._ready_seconds
        return {
            "id": run_id,
            "session_id": "bench",
            "base_model": "bench",
            "base_url": f"{self._base_url}/trainers/{run_id}",
            "created_at": CREATED_AT,
            "sampler": self._sampler(),
            "deployment_id": None,
            "name": "bench",
            "status": {"name": "ACTIVE"},
            "user": {"email": None},
        }

    def _sampler(self) -> dict[str, object]:
        return {
            "id": "sampler",
            "base_url": f"{self._base_url}/sampler/sync",
            "base_model": "bench",
            "created_at": CREATED_AT,
            "model_id": "m",
            "deployment_id": "d",
            "status": {"name": "ACTIVE"},
            "user": {"email": None},
        }

    def _trainer(self, steps: list[str]) -> Reply:
        run_id, operation = steps[1], steps[2]
        if operation == "health":
            is_ready = time.monotonic() >= self._ready_at.get(run_id, 0.0)
            return (200, b'{"status":"ok"}', 0.0) if is_ready else (400, b'{"error":"model is deploying"}', 0.0)
        if operation == "operations":
            return 200, _json({"status": "done", "result": RESULTS[steps[3].split("-")[0]]}), 0.0
        self._operations += 1
        return 202, _json({"operation_id": f"{operation}-{self._operations}", "schema_version": 1}), 0.0


RESULTS: dict[str, object] = {
    "init_trainer_server": {"step": 0, "lora_rank": 32},
    "forward_backward": {"loss": 1.0, "loss_fn_output_type": "bench", "loss_fn_outputs": [], "metrics": {"loss": 1.0}},
    "optim_step": {"metrics": {"step": 1.0}},
    "save_weights_for_sampler": {"version": 1, "path": "bt://loops:run0/sampler_weights/bench"},
}


def _checkpoint(run_id: str, number: int) -> dict[str, object]:
    return {
        "id": f"{run_id}c{number}",
        "checkpoint_id": f"step-{number}",
        "run_id": run_id,
        "checkpoint_type": "lora",
        "target": "trainer",
        "base_model": "bench",
        "lora_adapter_config": {"r": 32},
        "size_bytes": 33_638_400,
        "created_at": CREATED_AT,
        "sync_status": None,
    }


class Connection(asyncio.Protocol):
    """HTTP/1.1 with just enough parsing; bodies are counted and dropped."""

    def __init__(self, reply: Callable[[str, str], Reply]) -> None:
        self._reply = reply
        self._head = b""
        self._body_left = 0
        self._pending: Reply | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        while data:
            if self._pending is None:
                data = self._read_head(data)
            taken = min(len(data), self._body_left)
            self._body_left -= taken
            data = data[taken:]
            if self._pending is not None and self._body_left == 0:
                self._send(self._pending)
                self._pending = None

    def _read_head(self, data: bytes) -> bytes:
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return b""
        head, rest = self._head[:end], self._head[end + 4 :]
        self._head = b""
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        lower = head.lower()
        at = lower.find(b"content-length:")
        self._body_left = int(lower[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        self._pending = self._reply(method, target)
        if b"\r\nexpect: 100-continue" in lower:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return rest

    def _send(self, reply: Reply) -> None:
        status, body, seconds = reply
        head = (
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nx-trainers-policy-version: 1\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        if seconds:
            asyncio.get_running_loop().call_later(seconds, self._transport.write, head.encode() + body)
        else:
            self._transport.write(head.encode() + body)


async def serve(port: int, sample_seconds: float, ready_seconds: float, samples: int, *, with_ids: bool) -> None:
    """Serve until cancelled; prints ``ready`` when connections are accepted."""
    answers = Answers(
        f"http://127.0.0.1:{port}",
        sample_seconds=sample_seconds,
        ready_seconds=ready_seconds,
        samples=samples,
        with_ids=with_ids,
    )
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(answers.reply), "127.0.0.1", port, backlog=16_384)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--sample-seconds", type=float, default=0.0)
    parser.add_argument("--ready-seconds", type=float, default=3.0)
    parser.add_argument("--samples", type=int, default=4, help="the completions in each answer to a sample")
    parser.add_argument("--token-names", action="store_true", help="answer with the names of tokens only, without ids")
    given = parser.parse_args()
    asyncio.run(
        serve(given.port, given.sample_seconds, given.ready_seconds, given.samples, with_ids=not given.token_names)
    )
