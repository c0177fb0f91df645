"""Whatever a service answers, at whatever route: a value, or an error of this library."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from loops_async import AdamParams, Datum, LoopsError, ServiceClient, TrainingClient
from loops_async._session.heartbeat import Heartbeat
from tests.support.clock import Clock
from tests.support.mutations import mutated
from tests.support.patience import PATIENCE_SECONDS
from tests.support.scripted import COMPLETIONS, KEY, MODEL, RESULTS, Say, ScriptedService, serving
from tests.wire.test_routes import CASES

DATA = [Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, 3]})]
OUTPUT = {
    "loss": 1.5,
    "loss_fn_output_type": "t",
    "loss_fn_outputs": [{"logprobs": {"data": [-0.5, None], "dtype": "float32", "shape": [2]}}],
    "metrics": {"loss": 1.5},
}
OPERATIONS: dict[str, Callable[[TrainingClient], Awaitable[Any]]] = {
    "forward_backward": lambda trainer: trainer.forward_backward(DATA),
    "optim_step": lambda trainer: trainer.optim_step(AdamParams()),
    "save_state": lambda trainer: trainer.save_state("x"),
    "load_state": lambda trainer: trainer.load_state("bt://loops:r1/weights/x"),
}
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Content-Type": st.sampled_from(["text/html", "application/json; charset=x", ""]),
        "Content-Encoding": st.sampled_from(["gzip", "br", "gzip, gzip", "x" * 300]),
        "Retry-After": st.sampled_from(
            ["-1", "nan", "inf", "Mon, 01 Jan 99999999999 00:00:00 GMT", "9" * 5000, "soon"]
        ),
        "x-trainers-policy-version": st.sampled_from(["9" * 5000, "-1", "\u0662", "x"]),
        "X-Request-Id": st.just("r" * 9000),
    },
)
STATUSES = st.sampled_from([200, 200, 200, 202, 400, 404, 409, 422, 429, 500, 503])
NO_SHRINK = (Phase.explicit, Phase.reuse, Phase.generate)  # each example takes a moment: shrinking would take minutes
QUICK = settings(deadline=None, max_examples=15, phases=NO_SHRINK, suppress_health_check=list(HealthCheck))
FEW = settings(QUICK, max_examples=5)  # of many answers each, since a service and a client for each example cost more


def run(body: Callable[[ScriptedService, ServiceClient], Awaitable[None]]) -> None:
    """Run `body` against a service of its own, with pauses that take no time."""

    async def main() -> None:
        async with serving() as service, ServiceClient(api_key=KEY, base_url=service.url) as client:
            await asyncio.wait_for(body(service, client), PATIENCE_SECONDS)

    with pytest.MonkeyPatch.context() as patch:
        Clock().install(patch)
        patch.setattr(Heartbeat, "add", lambda *_: None)
        logging.disable(logging.CRITICAL)
        try:
            asyncio.run(main())
        finally:
            logging.disable(logging.NOTSET)


async def outcome(call: Callable[[], Awaitable[Any]]) -> None:
    with suppress(LoopsError):
        await call()


def say(status: int, body: bytes, headers: Mapping[str, str]) -> Say:
    return Say(status, body, headers)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.route)
@given(st.data())
@FEW
def test_the_control_plane(case: Any, data: st.DataObject) -> None:
    method, path = case.route.split()
    answers = data.draw(st.lists(st.builds(say, STATUSES, mutated(case.answer), HEADERS), min_size=15, max_size=15))

    async def body(service: ScriptedService, client: ServiceClient) -> None:
        service.always(method, path, Say(body=case.answer))
        for answer in answers:
            service.answer(method, path, answer)
            await outcome(lambda: case.call(client.control_plane))

    run(body)


@pytest.mark.parametrize("operation", OPERATIONS)
@given(st.data())
@QUICK
def test_operations_of_a_trainer(operation: str, data: st.DataObject) -> None:
    result = OUTPUT if operation == "forward_backward" else RESULTS[operation]
    acceptance = {"operation_id": "x", "schema_version": 1}
    accepted = data.draw(st.just(json.dumps(acceptance).encode()) | mutated(acceptance))
    polled = data.draw(st.builds(say, STATUSES, mutated({"status": "done", "result": result}), HEADERS))

    async def body(service: ScriptedService, client: ServiceClient) -> None:
        trainer = await client.create_lora_training_client(MODEL, rank=8)
        service.answer("POST", f"/trainer/{operation}", Say(202, accepted))
        service.always("GET", "/trainer/operations/x", Say(body={"status": "done", "result": result}))
        service.answer("GET", "/trainer/operations/x", polled)

        async def call() -> None:
            future: Any = await OPERATIONS[operation](trainer)
            await future

        await outcome(call)

    run(body)


@given(st.lists(st.builds(say, STATUSES, mutated(COMPLETIONS), HEADERS), min_size=15, max_size=15))
@FEW
def test_samples(answers: list[Say]) -> None:
    async def body(service: ScriptedService, client: ServiceClient) -> None:
        sampler = await client.create_sampling_client(MODEL)
        for answer in answers:
            service.answer("POST", "/sampler/sample", answer)
            await outcome(lambda: sampler.sample([1, 2]))

    run(body)
