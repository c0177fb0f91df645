"""A batch that is too large for one request is several, whose results are one (data-plane 1.7)."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loops_async import (
    AdamParams,
    AuthenticationError,
    BadRequestError,
    Datum,
    ForwardBackwardOutput,
    InputError,
    RemoteOpError,
    ServerShutdownError,
    TrainingClient,
)
from loops_async._operations import batch
from loops_async.protocol import MAX_REQUEST_BYTES
from tests.support.scripted import Say, ScriptedService, done

LIMIT = 800
FORWARD = "/trainer/forward_backward"


def keys(service: ScriptedService) -> list[str]:
    return [seen.headers["Idempotency-Key"] for seen in service.seen_at("POST", FORWARD)]


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one request hold two datums of `DATUM`, or one of `LONG`."""
    monkeypatch.setattr(batch, "MAX_REQUEST_BYTES", LIMIT)


DATUM = Datum(model_input=[1] * 100, loss_fn_inputs={})
LONG = Datum(model_input=[1] * 200, loss_fn_inputs={})


def tensors(*values: float) -> dict[str, Any]:
    return {"logprobs": {"data": list(values), "dtype": "float32", "shape": [len(values)]}}


class Parts:
    """Gives each part of a split call the result that the test wants."""

    def __init__(self, service: ScriptedService) -> None:
        self.service = service

    def result_in(self, *results: dict[str, Any]) -> None:
        for number, result in enumerate(results):
            self.service.answer("POST", "/trainer/forward_backward", Say(202, {"operation_id": f"part{number}"}))
            self.service.always("GET", f"/trainer/operations/part{number}", done(result))


@pytest.fixture
def parts(service: ScriptedService, small_limit: None) -> Parts:
    return Parts(service)


async def test_parts_are_contiguous_in_order_and_within_the_limit(
    service: ScriptedService, trainer: TrainingClient, small_limit: None
) -> None:
    data = [Datum(model_input=[number] * 100) for number in range(1, 6)]
    await trainer.forward_backward(data)
    await trainer.optim_step(AdamParams())
    *sent, step = service.submitted()
    assert [len(seen.json["data"]) for seen in sent] == [2, 2, 1]
    assert [datum["model_input"]["chunks"][0]["tokens"][0] for seen in sent for datum in seen.json["data"]] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert all(len(seen.body) <= LIMIT for seen in sent)
    assert [seen.json["seq_id"] for seen in (*sent, step)] == [2, 3, 4, 5]
    assert len({seen.headers["Idempotency-Key"] for seen in sent}) == 3


async def test_results_are_merged(parts: Parts, trainer: TrainingClient) -> None:
    parts.result_in(
        {
            "loss": 1.0,
            "loss_fn_output_type": "",
            "loss_fn_outputs": [tensors(-1.0), tensors(-2.0)],
            "metrics": {
                "loss": 1.0,
                "tokens": 10,
                "tokens:sum": 10,
                "ratio:max": 3.0,
                "ratio:min": 0.5,
                "only_here": 3.0,
                "skip_token_normalization": 1.0,
            },
        },
        {
            "loss": 4.0,
            "loss_fn_output_type": "logprobs",
            "loss_fn_outputs": [tensors(-3.0)],
            "metrics": {
                "loss": 4.0,
                "tokens": 40,
                "tokens:sum": 40,
                "ratio:max": 2.0,
                "ratio:min": 0.25,
                "only_there": 7.0,
                "skip_token_normalization": 1.0,
            },
        },
    )
    future = await trainer.forward_backward([DATUM, DATUM, DATUM], "cross_entropy", {"skip_token_normalization": True})
    output = await future
    assert future.operation_id == "part0"
    assert output.loss == pytest.approx((2 * 1.0 + 1 * 4.0) / 3), "weighted by datums"
    assert output.loss_fn_output_type == "logprobs", "the first that says it"
    assert [one["logprobs"].data for one in output.loss_fn_outputs] == [[-1.0], [-2.0], [-3.0]]
    assert output.metrics == {
        "loss": pytest.approx(2.0),
        "tokens": pytest.approx(20.0),
        "tokens:sum": 50.0,
        "ratio:max": 3.0,
        "ratio:min": 0.25,
        "only_here": 3.0,
        "only_there": 7.0,
        "skip_token_normalization": 1.0,
    }


@pytest.mark.parametrize(
    ("flags", "merged"), [((1.0, 1.0), 1.0), ((1.0, 0.0), 0.0), ((0.0, 0.0), 0.0), ((1.0, None), 0.0)]
)
async def test_normalisation_was_skipped_if_every_part_skipped_it(
    parts: Parts, trainer: TrainingClient, flags: tuple[float | None, ...], merged: float
) -> None:
    parts.result_in(*({"metrics": {} if flag is None else {"skip_token_normalization": flag}} for flag in flags))
    output = await (await trainer.forward_backward([LONG, LONG]))
    assert output.metrics == {"skip_token_normalization": merged}


async def test_a_number_that_is_missing_somewhere_is_not_made_up(parts: Parts, trainer: TrainingClient) -> None:
    parts.result_in({"loss": None}, {"loss": 1.0})
    assert math.isnan((await (await trainer.forward_backward([LONG, LONG]))).loss)


async def test_one_failing_part_fails_the_call(parts: Parts, service: ScriptedService, trainer: TrainingClient) -> None:
    parts.result_in({"loss": 1.0}, {})
    service.always("GET", "/trainer/operations/part1", Say(200, {"status": "error", "error": "out of memory"}))
    future = await trainer.forward_backward([LONG, LONG])
    for _ in range(2):
        with pytest.raises(RemoteOpError, match="out of memory") as failed:
            await future
    assert failed.value.operation_id == "part1"


async def test_a_part_that_is_refused_ends_the_call_and_its_number_is_free(
    service: ScriptedService, trainer: TrainingClient, small_limit: None
) -> None:
    service.answer("POST", "/trainer/forward_backward", Say(202, {"operation_id": "part0"}), Say(422, {"detail": "no"}))
    with pytest.raises(BadRequestError):
        await trainer.forward_backward([LONG, LONG, LONG])
    await trainer.optim_step(AdamParams())
    assert [seen.json["seq_id"] for seen in service.submitted()] == [2, 3, 3]


async def test_a_part_that_is_refused_says_what_is_in_the_gradients(
    service: ScriptedService, trainer: TrainingClient, small_limit: None
) -> None:
    service.answer("POST", FORWARD, Say(202, {"operation_id": "part0"}), Say(413, {"detail": "too large"}))
    with pytest.raises(BadRequestError, match=r"in 2 parts.*accepted data\[0:2\], whose gradients count") as refused:
        await trainer.forward_backward([DATUM, DATUM, DATUM])
    assert not refused.value.retryable
    assert refused.value.unfinished is not None
    assert refused.value.unfinished.accepted == 2
    await trainer.forward_backward([DATUM, DATUM, DATUM])
    assert keys(service)[2:] == keys(service)[:2] == [*refused.value.unfinished.keys], "no datum is trained twice"


async def test_a_shutdown_between_the_parts_says_what_is_in_the_gradients(
    service: ScriptedService, trainer: TrainingClient, small_limit: None
) -> None:
    service.answer("POST", FORWARD, Say(202, {"operation_id": "part0"}), Say(503, {"error": "bye"}))
    with pytest.raises(ServerShutdownError, match=r"accepted data\[0:1\], whose gradients") as going:
        await trainer.forward_backward([LONG, LONG, LONG])
    assert going.value.unfinished is not None
    await trainer.save_state("between")
    await trainer.forward_backward([LONG, LONG, LONG], resume=going.value.unfinished)
    assert keys(service)[2:] == [*going.value.unfinished.keys]


async def test_a_part_that_fails_alone_is_trained_again_alone(
    parts: Parts, service: ScriptedService, trainer: TrainingClient
) -> None:
    parts.result_in({"loss": 1.0}, {}, {"loss": 1.0})
    service.always("GET", "/trainer/operations/part1", Say(200, {"status": "error", "error": "out of memory"}))
    future = await trainer.forward_backward([LONG, LONG, LONG])
    with pytest.raises(RemoteOpError, match=r"data\[1:2\] failed; .* executed data\[0:1\], data\[2:3\]") as failed:
        await future
    assert failed.value.unfinished is not None
    assert failed.value.unfinished.accepted == 2
    assert future.done()
    await trainer.forward_backward([LONG, LONG, LONG])
    first, second = keys(service)[:3], keys(service)[3:]
    assert [one == two for one, two in zip(first, second, strict=True)] == [True, False, True]


async def test_a_lost_poll_of_a_part_is_no_outcome(
    parts: Parts, service: ScriptedService, trainer: TrainingClient
) -> None:
    parts.result_in({"loss": 1.0}, {"loss": 1.0})
    service.answer("GET", "/trainer/operations/part0", Say(401, {"error": "who?"}))
    service.answer("GET", "/trainer/operations/part1", Say(200, {"status": "error", "error": "out of memory"}))
    future = await trainer.forward_backward([LONG, LONG])
    with pytest.raises(AuthenticationError):
        await future
    assert not future.done()
    assert (await future).loss == 1.0


async def test_pairs_stay_together(service: ScriptedService, trainer: TrainingClient, small_limit: None) -> None:
    inputs = {"target_tokens": [1], "weights": [1.0], "ref_logprobs": [0.0]}
    await trainer.forward_backward([Datum(model_input=[1], loss_fn_inputs=inputs)] * 6, "dpo")
    counts = [len(seen.json["data"]) for seen in service.submitted()]
    assert sum(counts) == 6
    assert len(counts) > 1
    assert all(count % 2 == 0 for count in counts)


async def test_a_datum_that_is_too_large_takes_no_turn(
    service: ScriptedService, trainer: TrainingClient, small_limit: None
) -> None:
    huge = Datum(model_input=[1] * 1_000)
    with pytest.raises(InputError, match=r"data\[1\]: is 2,\d\d\d bytes of JSON"):
        await trainer.forward_backward([DATUM, huge])
    await trainer.optim_step(AdamParams())
    assert [seen.json["seq_id"] for seen in service.submitted()] == [2]


async def test_the_real_limit(service: ScriptedService, trainer: TrainingClient) -> None:
    tokens = [1] * 4_000_000  # 8 MB of JSON each
    data = [Datum(model_input=tokens)] * 4
    output = await (await trainer.forward([*data]))
    assert isinstance(output, ForwardBackwardOutput)
    sizes = [len(seen.body) for seen in service.submitted()]
    assert [round(size / 8e6) for size in sizes] == [3, 1]
    assert max(sizes) <= MAX_REQUEST_BYTES == 24 * 1024 * 1024
