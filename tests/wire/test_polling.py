"""Waiting for operations: what each answer to a poll leads to (data-plane 1.2), and what results may look like."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from loops_async import (
    AdamParams,
    ApiError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    ConnectError,
    Datum,
    NotFoundError,
    OperationFuture,
    OptimStepResponse,
    PermissionDeniedError,
    ProtocolError,
    RemoteOpError,
    ServerShutdownError,
    TrainingClient,
    UnknownRequestError,
)
from loops_async._operations import poller
from tests.support.clock import Clock
from tests.support.patience import PATIENCE_SECONDS
from tests.support.scripted import KEY, Hold, Reply, Say, ScriptedService, done, hang_up, hang_up_in_the_body, name_of

POLL = "/trainer/operations/op-7"
DATUM = Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, 3]})


@pytest.fixture
async def step(service: ScriptedService, trainer: TrainingClient) -> Submit:
    return Submit(service, trainer)


class Submit:
    """Hands an optimizer step in whose polls are answered as told, and then with ``{"metrics": {"step": 2.0}}``."""

    def __init__(self, service: ScriptedService, trainer: TrainingClient) -> None:
        self.service = service
        self.trainer = trainer

    async def __call__(self, *polls: Reply) -> OperationFuture[OptimStepResponse]:
        self.service.answer("POST", "/trainer/optim_step", Say(202, {"operation_id": "op-7", "schema_version": 1}))
        self.service.answer("GET", POLL, *polls)
        self.service.always("GET", POLL, done({"metrics": {"step": 2.0}}))
        return await self.trainer.optim_step(AdamParams())

    @property
    def polls(self) -> int:
        return len(self.service.seen_at("GET", POLL))


async def test_done(step: Submit) -> None:
    future = await step()
    assert await future == OptimStepResponse(metrics={"step": 2.0})
    assert await future.result() == OptimStepResponse(metrics={"step": 2.0})
    assert step.polls == 1


async def test_not_done_yet_is_asked_again(step: Submit, quick: Clock) -> None:
    future = await step(Say(408), Say(408, "<html>"), Say(408, {"error": "pending"}))
    await future
    assert step.polls == 4
    assert len(quick.pauses) == 3
    assert max(quick.pauses) < 0.1, "a service that does not hold polls is not hammered, and not left alone for long"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"status": "queued"},
        {"status": "running", "progress": 0.5},
        {"status": ""},
        {"result": {"metrics": None}},
    ],
    ids=repr,
)
async def test_a_status_that_is_not_known_is_asked_again_after_a_second(
    step: Submit, quick: Clock, caplog: pytest.LogCaptureFixture, body: Any
) -> None:
    await (await step(Say(200, body)))
    assert step.polls == 2
    assert quick.pauses == [1.0]
    assert any("unknown status" in record.getMessage() for record in caplog.records)


async def test_a_status_that_is_not_known_is_told_once_in_a_short_line(
    step: Submit, quick: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    await (await step(*[Say(200, {"status": f"\x1b[2J {KEY} " + "x" * 5000})] * 3))
    [told] = [record.getMessage() for record in caplog.records if "unknown status" in record.getMessage()]
    assert KEY not in told
    assert told.isprintable()
    assert len(told) < 200


@pytest.mark.parametrize(
    "body", ["<html>hello</html>", "", "null", "[]", '{"status": 5}', '{"status": "done"'], ids=repr
)
async def test_a_200_that_is_not_a_poll_is_no_outcome(step: Submit, quick: Clock, body: str) -> None:
    future = await step()
    step.service.always("GET", POLL, Say(200, body))
    with pytest.raises(ProtocolError, match=r"wait for optim_step of run r1.*not what Loops sends"):
        await future
    assert quick.now == pytest.approx(120.0)
    assert not future.done()
    step.service.always("GET", POLL, done({"metrics": {"step": 2.0}}))
    assert (await future).metrics == {"step": 2.0}


async def test_a_failed_operation(step: Submit) -> None:
    future = await step(Say(200, {"status": "error", "error": "loss is NaN", "error_class": "ValueError"}))
    for _ in range(2):
        with pytest.raises(RemoteOpError) as failed:
            await future
    assert str(failed.value) == "ValueError: loss is NaN (run_id=r1, operation=optim_step, operation_id=op-7)"
    assert (failed.value.error_class, failed.value.operation_id, failed.value.run_id) == ("ValueError", "op-7", "r1")
    assert (failed.value.category, failed.value.retryable) == ("remote", False)
    assert step.polls == 1


@pytest.mark.parametrize("body", [{"status": "error"}, {"status": "error", "error": None, "error_class": None}])
async def test_a_failure_without_words(step: Submit, body: Any) -> None:
    with pytest.raises(RemoteOpError, match="without a message") as failed:
        await (await step(Say(200, body)))
    assert failed.value.error_class is None


async def test_a_failure_that_names_a_signed_url(step: Submit) -> None:
    error = f"403 for https://bucket.example/x?X-Signature=5ecret with {KEY}"
    with pytest.raises(RemoteOpError, match=r"403 for https://bucket.example/x\?… with \*\*\*") as failed:
        await (await step(Say(200, {"status": "error", "error": error})))
    assert "5ecret" not in str(failed.value)


@pytest.mark.parametrize("status", [404, 410])
async def test_an_operation_that_the_service_forgot(step: Submit, status: int) -> None:
    future = await step(Say(status, {"detail": "unknown operation"}))
    with pytest.raises(UnknownRequestError, match=r"about an hour.*Submit it again") as unknown:
        await future
    assert (unknown.value.operation_id, unknown.value.operation, unknown.value.category) == (
        "op-7",
        "optim_step",
        "unknown",
    )
    assert future.done(), "asking again would not help"
    assert step.polls == 1


@pytest.mark.parametrize(
    "page",
    [
        Say(404, "<html>Not Found</html>"),
        Say(404, ""),
        Say(500, "<html>"),
        Say(500, {"error": "bug"}),
        Say(502, ""),
        Say(503, "<html>Service Temporarily Unavailable</html>"),
        Say(503, {"error": "later"}, {"Retry-After": "1"}),
        Say(520, ""),
    ],
    ids=repr,
)
async def test_what_says_nothing_of_the_operation_is_waited_out(step: Submit, quick: Clock, page: Say) -> None:
    future = await step(page, page)
    assert (await future).metrics == {"step": 2.0}
    assert step.polls == 3


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (Say(401, {"error": "who?"}), AuthenticationError),
        (Say(403, "<html>proxy"), PermissionDeniedError),
        (Say(409, {"error": "no"}), ConflictError),
        (Say(410, "<html>"), NotFoundError),
        (Say(422, {"error": "no"}), BadRequestError),
    ],
    ids=repr,
)
async def test_a_refused_poll_is_raised_at_once_and_can_be_waited_for_again(
    step: Submit, quick: Clock, refusal: Say, kind: type[ApiError]
) -> None:
    future = await step(refusal)
    with pytest.raises(kind):
        await future
    assert not future.done()
    assert (await future).metrics == {"step": 2.0}
    assert (step.polls, quick.pauses) == (2, [])


@pytest.mark.parametrize("cut", [Say(502, "<html>"), Say(504, ""), hang_up, hang_up_in_the_body], ids=name_of)
async def test_a_held_poll_that_a_gateway_cuts_is_no_failure(
    step: Submit, quick: Clock, monkeypatch: pytest.MonkeyPatch, cut: Reply
) -> None:
    monkeypatch.setattr(poller, "CUT_HOLD", 0.0)
    future = await step(*[cut] * 200)
    assert (await future).metrics == {"step": 2.0}
    assert step.polls == 201
    assert max(quick.pauses) <= poller.SHORTEST_HOLD


async def test_502_is_waited_out(step: Submit, quick: Clock) -> None:
    future = await step(Say(502, "<html>Bad Gateway</html>"), Say(502, ""))
    assert (await future).metrics == {"step": 2.0}
    assert [1 <= pause <= 4 for pause in quick.pauses] == [True, True]


async def test_503_is_a_trainer_going_away(step: Submit, quick: Clock) -> None:
    future = await step(Say(503, {"error": "bye"}), Say(503, {"error": "bye"}))
    for _ in range(2):
        with pytest.raises(ServerShutdownError, match=r"bye.*create a new run"):
            await future
    assert (await future).metrics == {"step": 2.0}, "it came up again, and knows the operation"


@pytest.mark.parametrize("lost", [hang_up, hang_up_in_the_body], ids=["no answer", "half an answer"])
async def test_a_broken_connection_is_waited_out(step: Submit, quick: Clock, lost: Reply) -> None:
    future = await step(lost, lost)
    assert (await future).metrics == {"step": 2.0}
    assert step.polls == 3


async def test_a_trainer_that_stays_away_is_given_up_but_may_be_asked_again(step: Submit, quick: Clock) -> None:
    future = await step()
    step.service.always("GET", POLL, hang_up)
    with pytest.raises(ConnectError):
        await future
    assert quick.now == pytest.approx(120.0)
    assert not future.done()
    step.service.always("GET", POLL, done({"metrics": {"step": 3.0}}))
    assert (await future).metrics == {"step": 3.0}


async def test_only_the_oldest_operations_are_asked_for(service: ScriptedService, trainer: TrainingClient) -> None:
    # They finish in order, so the ninth cannot be done before one of the first eight is.
    held = [Hold(done({"metrics": {"step": float(number)}})) for number in range(8)]
    for number in range(12):
        service.answer("POST", "/trainer/optim_step", Say(202, {"operation_id": f"op{number}"}))
        if number < 8:
            # The service lets each poll go twice before it knows more.
            service.answer("GET", f"/trainer/operations/op{number}", Say(408), Say(408), held[number])
        else:
            service.answer("GET", f"/trainer/operations/op{number}", done({"metrics": {"step": float(number)}}))
    futures = [await trainer.optim_step(AdamParams()) for _ in range(12)]
    async with asyncio.timeout(PATIENCE_SECONDS):
        for hold in held:
            await hold.arrived.wait()
    assert not service.seen_at("GET", "/trainer/operations/op8")
    for hold in held:
        hold.go.set()
    steps = [await future for future in futures]
    assert [step.metrics for step in steps] == [{"step": float(number)} for number in range(12)]


# --- results ---


async def test_a_null_among_the_numbers_of_a_step_reads_as_nan(step: Submit) -> None:
    # NaN has no word in JSON: a gradient that overflowed comes back as null.
    future = await step(done({"metrics": {"grad_norm": None, "step": 2}}))
    metrics = (await future).metrics
    assert metrics is not None
    assert math.isnan(metrics["grad_norm"])
    assert metrics["step"] == 2


async def test_nan_and_infinity_are_read_as_they_are(service: ScriptedService, trainer: TrainingClient) -> None:
    # JSON does not have them, but servers in Python write them.
    service.answer("POST", "/trainer/forward", Say(202, {"operation_id": "op-7"}))
    tensors = '{"logprobs": {"data": [-Infinity, null, NaN, -0.5], "dtype": "float32", "shape": [4]}}'
    result = f'{{"loss": Infinity, "loss_fn_outputs": [{tensors}], "metrics": {{"loss": NaN, "tokens": 4}}}}'
    service.always("GET", POLL, Say(200, f'{{"status": "done", "result": {result}}}'))
    output = await (await trainer.forward([DATUM]))
    assert output.loss == math.inf
    assert output.loss_fn_outputs[0]["logprobs"].data[0] == -math.inf
    assert [math.isnan(one or 0) for one in output.loss_fn_outputs[0]["logprobs"].data[1:]] == [True, True, False]
    assert math.isnan(output.metrics["loss"])
    assert output.metrics["tokens"] == 4


async def test_nan_in_a_step_is_read_as_it_is(step: Submit) -> None:
    future = await step(Say(200, '{"status": "done", "result": {"metrics": {"grad_norm": NaN, "lr": 0.1}}}'))
    metrics = (await future).metrics
    assert metrics is not None
    assert math.isnan(metrics["grad_norm"])
    assert metrics["lr"] == 0.1


@pytest.mark.parametrize("result", [{"metrics": None}, {}, {"metrics": {}, "newer": [1]}], ids=repr)
async def test_a_step_that_tells_nothing(step: Submit, result: Any) -> None:
    assert not (await (await step(done(result)))).metrics


async def test_a_forward_pass(service: ScriptedService, trainer: TrainingClient) -> None:
    service.answer("POST", "/trainer/forward", Say(202, {"operation_id": "op-7"}))
    service.answer(
        "GET",
        POLL,
        done(
            {
                "loss": 2.5,
                "loss_fn_output_type": "logprobs",
                "loss_fn_outputs": [
                    {"logprobs": {"data": [-0.5, None], "dtype": "float32", "shape": [2]}},
                    {"logprobs": {"data": [-1, -2], "dtype": "float32", "shape": [1, 2]}, "new": _tensor([1])},
                ],
                "metrics": {"loss": None, "tokens": 4},
                "newer": {"unknown": True},
            }
        ),
    )
    output = await (await trainer.forward([DATUM]))
    first, second = output.loss_fn_outputs
    assert (output.loss, output.loss_fn_output_type) == (2.5, "logprobs")
    assert first["logprobs"].data[0] == -0.5
    assert math.isnan(first["logprobs"].data[1] or 0)
    assert second["logprobs"].tolist() == [[-1, -2]]
    assert math.isnan(output.metrics["loss"])
    assert output.metrics["tokens"] == 4


def _tensor(data: list[Any]) -> dict[str, Any]:
    return {"data": data, "dtype": "int64", "shape": [len(data)]}


async def test_a_loss_that_is_not_a_number(service: ScriptedService, trainer: TrainingClient) -> None:
    service.answer("POST", "/trainer/forward", Say(202, {"operation_id": "op-7"}))
    service.answer("GET", POLL, done({"loss": None}))
    assert math.isnan((await (await trainer.forward([DATUM]))).loss)


@pytest.mark.parametrize(
    "result", [None, [], "done", {"loss_fn_outputs": [{"logprobs": 5}]}, {"loss": "low"}], ids=repr
)
async def test_a_result_in_another_language(service: ScriptedService, trainer: TrainingClient, result: Any) -> None:
    service.answer("POST", "/trainer/forward", Say(202, {"operation_id": "op-7"}))
    service.always("GET", POLL, done(result))
    with pytest.raises(ProtocolError, match=r"wait for forward of run r1"):
        await (await trainer.forward([DATUM]))


async def test_the_id_of_an_operation_is_escaped(service: ScriptedService, trainer: TrainingClient) -> None:
    service.answer("POST", "/trainer/optim_step", Say(202, {"operation_id": "a/b?c"}))
    service.always("GET", "/trainer/operations/a%2Fb%3Fc", done({}))
    await (await trainer.optim_step(AdamParams()))
