"""Runs every client that is an agent's way to a model, unmodified, and looks at what the gateway recorded.

Usage: python -m tests.judges [--many N] [--only NAME]

Each conversation is plain and streamed, without and with tools, alone and `--many` at a time. The model is the embedded
torch engine's `tiny`, whose replies are random; with tools, it is made to say what a model would that calls one, and
its own logprobs of that are recorded. Of each conversation every call must continue the one before, so that it is one
sequence, and the trainer's logprobs of it must be those of the record. Prints one line for each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from msgspec import Struct

import loops_async as loops
from loops_local import serve_in_thread

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = Path(__file__).with_name("clients.py")
ENVIRONMENTS = {
    "openai2": ("openai_chat", "openai_responses", "openai_ready", "litellm", "verifiers"),
    "openai3": (
        *("openai_chat", "openai_responses", "openai_ready", "agents_chat", "agents_responses"),
        *("anthropic", "anthropic_ready"),
    ),
}
"""Which clients each environment has; ``locks/agents-NAME.txt`` has their versions."""
NEWEST_FIRST = ("3.13", "3.12")
CLOSE = 1e-4
LOOKED_AT = 8
"""Of many conversations, the trainer computes the logprobs of so many."""
PATIENCE_SECONDS = 240
FAILED = "FAILED"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def pythons() -> list[str]:
    found = [sys.executable] if sys.version_info >= (3, 12) else []
    for version in NEWEST_FIRST:
        found += map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
        found.append(f"python{version}")
    return found


def environment(name: str) -> Path:
    """Return the interpreter of an environment, which is made if need be."""
    directory = ROOT / ".venv-judges" / name
    python, lock = directory / "bin" / "python", ROOT / "locks" / f"agents-{name}.txt"
    done = directory / "lock.txt"
    if done.is_file() and done.read_text() == lock.read_text():
        return python
    last: Exception | None = None
    for candidate in pythons():
        try:
            subprocess.run([candidate, "-m", "venv", "--clear", directory], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as problem:
            last = problem
            continue
        options = [
            "-qq",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-compile",
            "--require-hashes",
            "--requirement",
            lock,
        ]
        subprocess.run([python, "-m", "pip", "install", *options], check=True)
        done.write_text(lock.read_text())
        return python
    raise RuntimeError(f"no Python from {', '.join(NEWEST_FIRST)}: {last}")


class Scripted:
    """The sampler of a gateway; where the prompt offers tools, it says what calls one, and then what came of it.

    Its logprobs are the model's own, whatever it says.
    """

    def __init__(self, sampler: loops.SamplingClient, tokenizer: Any) -> None:
        self._real = sampler.with_options(timeout=PATIENCE_SECONDS)  # another client of the same sampler
        self._tokenizer = tokenizer

    async def __call__(
        self, prompt: loops.ModelInput, count: int, params: loops.SamplingParams, **options: Any
    ) -> loops.SampleResponse:
        text = self._tokenizer.decode(prompt.to_ints())
        turn = text.rpartition("<|im_start|>user\n")[2]
        if "<tools>" not in text:
            tokens = (await self._real.sample(prompt, 1, params, **options)).sequences[0].tokens
        else:
            said = "warm" if turn.startswith("<tool_response>") else CALL
            tokens = self._tokenizer.encode(said, add_special_tokens=False)
        if tokens[-1:] != [self._tokenizer.eos_token_id]:  # some clients fail where a reply is cut
            tokens = [*tokens, self._tokenizer.eos_token_id]
        scored = await self._real.compute_logprobs([*prompt.to_ints(), *tokens])
        logprobs = [each or 0.0 for each in scored[prompt.length :]]
        sequence = loops.SampledSequence(tokens=tokens, logprobs=logprobs, stop_reason="stop")
        return loops.SampleResponse(sequences=[sequence] * count, policy_version=0)


class Way(Struct):
    """A round of a client: how it converses, and in how many rollouts at once."""

    stream: bool
    tools: bool
    rollouts: list[loops.AgentRollout]

    def __str__(self) -> str:
        return f"{'streamed' if self.stream else 'plain':8} {'with tools' if self.tools else '':10}"


async def judge(trainer: loops.TrainingClient, python: Path, name: str, ways: list[Way]) -> list[str]:
    """Let a client converse in each way; return the figures of each record, or what is wrong with it."""
    rounds = [
        {
            "stream": way.stream,
            "tools": way.tools,
            "rollouts": [{"base_url": each.base_url, "api_key": each.api_key} for each in way.rollouts],
        }
        for way in ways
    ]
    said = json.loads(await _run(python, json.dumps({"judge": name, "rounds": rounds})))
    return [await _figures(trainer, name, way, each) for way, each in zip(ways, said, strict=True)]


async def _figures(trainer: loops.TrainingClient, name: str, way: Way, said: dict[str, Any]) -> str:
    for rollout in way.rollouts:
        await rollout.close()
    try:
        assert "error" not in said, said["error"][-600:]
        for rollout, last in zip(way.rollouts, said["said"], strict=True):
            _check(name, way, rollout, last)
        datums = [datum for each in way.rollouts[:LOOKED_AT] for datum in each.to_datums(1.0)]
        distance = await _distance(trainer, datums)
        assert distance < CLOSE, distance
    except AssertionError as problem:
        return f"{FAILED}: {problem!r:.1500}"
    return f"{len(way.rollouts):4} conversations  {said['seconds']:5.1f} s  logprobs differ by {distance:.1e}"


def _check(name: str, way: Way, rollout: loops.AgentRollout, last: str) -> None:
    """Look at the record of one conversation: each call continues the one before."""
    calls = rollout.calls
    expected = (1 if name == "verifiers" else 2) * (2 if way.tools else 1)
    assert [call.status for call in calls] == ["ok"] * expected, [call.error for call in calls]
    assert [call.branch for call in calls] == ["new", *[None] * (len(calls) - 1)], [call.branch for call in calls]
    assert len(rollout.trajectories()) == 1
    assert last == (calls[-1].reply or {})["content"] or not way.tools, last


async def _run(python: Path, asked: str) -> str:
    process = await asyncio.create_subprocess_exec(
        python, CLIENTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        said, errors = await asyncio.wait_for(process.communicate(asked.encode()), PATIENCE_SECONDS)
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode == 0, errors.decode()[-600:]
    return said.decode()


async def _distance(trainer: loops.TrainingClient, datums: list[loops.Datum]) -> float:
    """Return the largest difference between the recorded logprobs and the trainer's."""
    future = await trainer.forward(datums, "importance_sampling", loss_fn_config={"score_all_targets": True})
    largest = 0.0
    for datum, output in zip(datums, (await future).loss_fn_outputs, strict=True):
        inputs: Any = datum.loss_fn_inputs
        own: Any = output["logprobs"].data
        for recorded, trained, counts in zip(inputs["logprobs"].data, own, inputs["mask"].data, strict=True):
            largest = max(largest, abs(recorded - trained) if counts else 0.0)
    return largest


async def main() -> int:
    """Run what was asked for; return 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--many", type=int, default=200)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    failed = 0
    with serve_in_thread(engine="torch", model="tiny", provisioning_seconds=0.0) as local:
        async with loops.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="deactivate") as service:
            trainer = await service.create_lora_training_client("tiny", rank=8)
            sampler = await trainer.save_weights_and_get_sampling_client("judges")
            scripted: Any = Scripted(sampler, await sampler.get_tokenizer())
            sampler.sample = scripted  # type: ignore[method-assign]  # this one client says what the judges need
            async with loops.AgentGateway(sampler) as gateway:
                for name, clients in ENVIRONMENTS.items():
                    chosen = [each for each in clients if arguments.only in f"{name} {each}"]
                    if not chosen:
                        continue
                    try:
                        python = await asyncio.to_thread(environment, name)
                    except (RuntimeError, OSError, subprocess.CalledProcessError) as problem:
                        print(f"NOT TESTED: {', '.join(chosen)}: the environment {name} cannot be made: {problem}")
                        continue
                    for client in chosen:
                        failed += await _all_ways(gateway, trainer, python, f"{name} {client}", arguments.many)
    print(f"{failed} failed")
    return 1 if failed else 0


async def _all_ways(
    gateway: loops.AgentGateway, trainer: loops.TrainingClient, python: Path, label: str, many: int
) -> int:
    """Let a client converse in every way; return how many went wrong."""
    name = label.split()[1]
    streams = (False,) if name == "verifiers" else (False, True)
    chosen = [(stream, tools, 1) for tools in (False, True) for stream in streams]
    ways = [
        Way(stream, tools, [gateway.rollout() for _ in range(count)])
        for stream, tools, count in [*chosen, (streams[-1], True, many)]
    ]
    try:
        figures = await judge(trainer, python, name, ways)
    except (AssertionError, TimeoutError) as problem:
        figures = [f"{FAILED}: {problem!r:.1500}"] * len(ways)
    for way, each in zip(ways, figures, strict=True):
        print(f"{label:28} {way} {each}", flush=True)
    return sum(each.startswith(FAILED) for each in figures)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
