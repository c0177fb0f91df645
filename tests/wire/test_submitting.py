"""Handing operations in at a trainer: order, numbers, keys, and what each answer leads to (data-plane 1.3, 1.5)."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest
from aiohttp import web

from loops_async import (
    AdamParams,
    ApiError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    ConnectError,
    Datum,
    InputError,
    LoopsError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    ServerError,
    ServerShutdownError,
    TrainingClient,
)
from loops_async._http.retry import OUTAGE
from tests.support.clock import Clock
from tests.support.scripted import Hold, Reply, Say, ScriptedService, hang_up, hang_up_in_the_body, name_of

STEP = "/trainer/optim_step"
DATUM = Datum(model_input=[1, 2], loss_fn_inputs={"target_tokens": [2, 3]})


def numbers(service: ScriptedService) -> list[tuple[str, int]]:
    return [(seen.path.removeprefix("/trainer/"), seen.json["seq_id"]) for seen in service.submitted()]


async def turns_of_the_loop(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_calls_are_sent_in_the_order_in_which_they_were_made(
    service: ScriptedService, trainer: TrainingClient
) -> None:
    calls = [
        trainer.forward_backward([DATUM]),
        trainer.optim_step(AdamParams()),
        trainer.forward([DATUM]),
        trainer.save_state("a"),
        trainer.optim_step(AdamParams()),
    ]
    await asyncio.gather(*calls)
    assert numbers(service) == [
        ("forward_backward", 2),
        ("optim_step", 3),
        ("forward", 4),
        ("save_state", 5),
        ("optim_step", 6),
    ]


async def test_nothing_is_sent_before_what_came_before_was_answered(
    service: ScriptedService, trainer: TrainingClient
) -> None:
    slow = Hold(Say(202, {"operation_id": "slow", "schema_version": 1}))
    service.answer("POST", "/trainer/forward_backward", slow)
    first = asyncio.create_task(trainer.forward_backward([DATUM]))
    second = asyncio.create_task(trainer.optim_step(AdamParams()))
    await slow.arrived.wait()
    await turns_of_the_loop()
    assert numbers(service) == [("forward_backward", 2)]
    slow.go.set()
    await asyncio.gather(first, second)
    assert numbers(service) == [("forward_backward", 2), ("optim_step", 3)]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequestError),
        (401, AuthenticationError),
        (403, PermissionDeniedError),
        (404, NotFoundError),
        (409, ConflictError),
        (413, BadRequestError),
        (422, BadRequestError),
        (501, ServerError),
    ],
)
async def test_a_refusal_is_raised_at_once_and_not_hammered(
    service: ScriptedService, trainer: TrainingClient, quick: Clock, status: int, kind: type[ApiError]
) -> None:
    service.answer("POST", STEP, Say(status, {"detail": "learning_rate is too large"}))
    with pytest.raises(kind, match=rf"optim_step of run r1.*answered {status}: learning_rate is too large") as refused:
        await trainer.optim_step(AdamParams())
    assert refused.value.status == status
    assert not refused.value.retryable
    assert len(service.seen_at("POST", STEP)) == 1
    assert quick.pauses == []


async def test_503_is_a_trainer_going_away(service: ScriptedService, trainer: TrainingClient, quick: Clock) -> None:
    service.answer("POST", STEP, Say(503, {"error": "shutting down"}, {"X-Request-Id": "req-9"}))
    with pytest.raises(ServerShutdownError, match=r"shutting down.*req-9.*create a new run") as going:
        await trainer.optim_step(AdamParams())
    assert (going.value.status, going.value.request_id, going.value.retryable) == (503, "req-9", False)
    assert len(service.seen_at("POST", STEP)) == 1


@pytest.mark.parametrize("status", [408, 502, 504])
async def test_a_gateways_bad_moment_is_waited_out(
    service: ScriptedService, trainer: TrainingClient, quick: Clock, status: int
) -> None:
    service.answer("POST", STEP, Say(status, "<html>Bad Gateway</html>"), Say(status, {}))
    await trainer.optim_step(AdamParams())
    assert len(service.seen_at("POST", STEP)) == 3
    assert len(quick.pauses) == 2


async def test_a_limit_of_requests_is_waited_out_for_as_long_as_it_says(
    service: ScriptedService, trainer: TrainingClient, quick: Clock
) -> None:
    service.answer("POST", STEP, Say(429, {"error": "slow down"}, {"Retry-After": "7"}))
    await trainer.optim_step(AdamParams())
    assert quick.pauses == [7.0]


async def test_a_gateways_final_word_is_not_waited_out(
    service: ScriptedService, trainer: TrainingClient, quick: Clock
) -> None:
    headers = {"X-Baseten-Error-Source": "06", "X-Baseten-Error-Code": "100"}
    service.answer("POST", STEP, Say(429, {"error": "no quota at all"}, headers))
    with pytest.raises(RateLimitError) as refused:
        await trainer.optim_step(AdamParams())
    assert not refused.value.retryable
    assert len(service.seen_at("POST", STEP)) == 1


@pytest.mark.parametrize("lost", [hang_up, hang_up_in_the_body], ids=["no answer", "half an answer"])
async def test_an_answer_that_was_lost_is_asked_for_again_with_the_same_key(
    service: ScriptedService, trainer: TrainingClient, quick: Clock, lost: Reply
) -> None:
    service.answer("POST", STEP, lost, lost)
    future = await trainer.optim_step(AdamParams())
    assert (await future).metrics == {"step": 1.0}
    attempts = service.seen_at("POST", STEP)
    assert len(attempts) == 3
    assert len({seen.headers["Idempotency-Key"] for seen in attempts}) == 1
    assert len({seen.body for seen in attempts}) == 1, "the same number, too"


async def test_each_operation_has_a_key_of_its_own(service: ScriptedService, trainer: TrainingClient) -> None:
    for _ in range(3):
        await trainer.optim_step(AdamParams())
    keys = {seen.headers["Idempotency-Key"] for seen in service.seen_at("POST", STEP)}
    assert len(keys) == 3
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in keys)


async def test_a_trainer_that_stays_away_is_given_up(
    service: ScriptedService, trainer: TrainingClient, quick: Clock
) -> None:
    service.always("POST", STEP, hang_up)
    with pytest.raises(ConnectError, match=r"optim_step of run r1.*broke.*may have accepted optim_step") as gone:
        await trainer.optim_step(AdamParams())
    assert not gone.value.retryable, "a new call would be another step"
    assert gone.value.unfinished is not None
    [key] = gone.value.unfinished.keys
    assert {seen.headers["Idempotency-Key"] for seen in service.seen_at("POST", STEP)} == {key}
    assert quick.now == pytest.approx(OUTAGE.seconds)


class Unfinished:
    """An optimizer step whose submission failed for good, so nobody knows whether it was executed."""

    def __init__(self, service: ScriptedService, trainer: TrainingClient) -> None:
        self.service = service
        self.trainer = trainer

    async def error(self, reply: Reply = hang_up) -> LoopsError:
        self.service.always("POST", STEP, reply)
        with pytest.raises(LoopsError) as failed:
            await self.trainer.optim_step(AdamParams())
        self.service.always("POST", STEP, self._accept)
        self.service.seen.clear()
        return failed.value

    async def _accept(self, request: web.BaseRequest) -> web.StreamResponse:
        return await Say(202, {"operation_id": request.headers["Idempotency-Key"]})(request)

    @property
    def keys(self) -> list[str]:
        return [seen.headers["Idempotency-Key"] for seen in self.service.seen_at("POST", STEP)]


@pytest.fixture
def unfinished(service: ScriptedService, trainer: TrainingClient, quick: Clock) -> Unfinished:
    return Unfinished(service, trainer)


@pytest.mark.parametrize(
    "reply",
    [
        hang_up,
        hang_up_in_the_body,
        Say(500, {"error": "bug"}),
        Say(503, "<html>upstream connect error"),
        Say(504, ""),
        Say(522, ""),
        Say(202, "<html>Welcome</html>"),
    ],
    ids=name_of,
)
async def test_the_same_call_again_goes_on_under_the_same_key(unfinished: Unfinished, reply: Reply) -> None:
    error = await unfinished.error(reply)
    assert not error.retryable
    assert error.unfinished is not None
    assert error.unfinished.operation == "optim_step"
    for _ in range(2):  # a refusal does not make the first one certain
        unfinished.service.answer("POST", STEP, Say(401, {"error": "who?"}))
        with pytest.raises(AuthenticationError) as refused:
            await unfinished.trainer.optim_step(AdamParams())
        assert refused.value.unfinished == error.unfinished
    await unfinished.trainer.optim_step(AdamParams())
    assert unfinished.keys == [*error.unfinished.keys] * 3
    await unfinished.trainer.optim_step(AdamParams())
    assert unfinished.keys[-1] not in error.unfinished.keys, "a finished operation is not repeated"


async def test_another_call_between_ends_the_repetition(unfinished: Unfinished) -> None:
    error = await unfinished.error()
    assert error.unfinished is not None
    await unfinished.trainer.optim_step(AdamParams(learning_rate=0.5))
    await unfinished.trainer.optim_step(AdamParams())
    assert not set(unfinished.keys) & set(error.unfinished.keys)
    await unfinished.trainer.optim_step(AdamParams(), resume=error.unfinished)
    assert unfinished.keys[-1:] == [*error.unfinished.keys]


async def test_an_unfinished_call_survives_the_process(unfinished: Unfinished) -> None:
    error = pickle.loads(pickle.dumps(await unfinished.error()))
    await unfinished.trainer.save_state("between")
    await unfinished.trainer.optim_step(AdamParams(), resume=error.unfinished)
    assert unfinished.keys == [*error.unfinished.keys]


async def test_only_the_same_call_resumes(unfinished: Unfinished) -> None:
    error = await unfinished.error()
    with pytest.raises(InputError, match=r"resume: belongs to another call of optim_step"):
        await unfinished.trainer.optim_step(AdamParams(learning_rate=0.5), resume=error.unfinished)
    assert unfinished.keys == []


async def test_a_trainer_that_was_never_reached_leaves_nothing_unfinished(
    service: ScriptedService, trainer: TrainingClient, quick: Clock
) -> None:
    service.always("POST", STEP, Say(429, {"error": "slow down"}))
    with pytest.raises(RateLimitError) as failed:
        await trainer.optim_step(AdamParams())
    assert failed.value.retryable
    assert failed.value.unfinished is None
    await trainer.save_state("next")
    assert numbers(service)[-1] == ("save_state", 2), "its number is free"


@pytest.mark.parametrize(
    "body",
    [
        {"schema_version": 1},
        {"operation_id": "", "schema_version": 1},
        {"operation_id": 5, "schema_version": 1},
        {"operation_id": "x", "schema_version": 2},
        {"operation_id": "x\r\nX-Evil: 1", "schema_version": 1},
        {"operation_id": "x" * 300, "schema_version": 1},
        ["x"],
        None,
        "<html>Welcome</html>",
        "",
    ],
    ids=repr,
)
async def test_an_acceptance_that_cannot_be_read_is_asked_for_again_with_the_same_key(
    service: ScriptedService, trainer: TrainingClient, quick: Clock, body: Any
) -> None:
    service.answer("POST", STEP, Say(202, body))
    await trainer.optim_step(AdamParams())
    assert len(service.seen_at("POST", STEP)) == 2
    service.always("POST", STEP, Say(202, body))
    with pytest.raises(ProtocolError, match="not what Loops sends"):
        await trainer.optim_step(AdamParams(learning_rate=0.5))
    assert len({seen.headers["Idempotency-Key"] for seen in service.seen_at("POST", STEP)}) == 2


@pytest.mark.parametrize("extra", [{"extra": [1]}, {"schema_version": None}], ids=repr)
async def test_an_acceptance_without_a_schema_version_is_good(
    service: ScriptedService, trainer: TrainingClient, extra: dict[str, Any]
) -> None:
    service.answer("POST", STEP, Say(202, {"operation_id": "x", **extra}))
    assert (await trainer.optim_step(AdamParams())).operation_id == "x"


# --- what takes no turn and no number ---


async def test_refused_arguments_take_neither_turn_nor_number(
    service: ScriptedService, trainer: TrainingClient
) -> None:
    wrong: list[Any] = [None, {"learning_rate": 1e-4}, AdamParams(learning_rate=-1.0)]
    for params in wrong:
        with pytest.raises(InputError, match="adam_params"):
            await trainer.optim_step(params)
    with pytest.raises(InputError):
        await trainer.forward_backward([])
    with pytest.raises(InputError):
        await trainer.save_state("../x")
    with pytest.raises(InputError):
        await trainer.load_state("bt://nonsense")
    await trainer.optim_step(AdamParams())
    assert numbers(service) == [("optim_step", 2)]


async def test_a_refused_operation_gives_its_number_back(service: ScriptedService, trainer: TrainingClient) -> None:
    service.answer("POST", "/trainer/forward_backward", Say(422, {"detail": "no"}))
    outcomes = await asyncio.gather(
        trainer.forward_backward([DATUM]), trainer.optim_step(AdamParams()), return_exceptions=True
    )
    assert isinstance(outcomes[0], BadRequestError)
    assert not isinstance(outcomes[1], BaseException)
    assert numbers(service) == [("forward_backward", 2), ("optim_step", 2)]


async def test_a_call_cancelled_before_its_turn_is_never_sent(
    service: ScriptedService, trainer: TrainingClient
) -> None:
    slow = Hold(Say(202, {"operation_id": "slow"}))
    service.answer("POST", "/trainer/forward_backward", slow)
    first = asyncio.create_task(trainer.forward_backward([DATUM]))
    withdrawn = [asyncio.create_task(trainer.save_state(f"withdrawn-{number}")) for number in range(2)]
    last = asyncio.create_task(trainer.optim_step(AdamParams()))
    await slow.arrived.wait()
    for task in withdrawn:
        task.cancel()
    await asyncio.wait(withdrawn)
    assert all(task.cancelled() for task in withdrawn)
    await turns_of_the_loop()
    assert not last.done(), "nobody overtakes the one in flight"
    slow.go.set()
    await asyncio.gather(first, last)
    assert numbers(service) == [("forward_backward", 2), ("optim_step", 3)]


async def test_a_call_cancelled_before_it_began_is_never_sent(
    service: ScriptedService, trainer: TrainingClient
) -> None:
    withdrawn = asyncio.create_task(trainer.save_state("withdrawn"))
    await asyncio.sleep(0)  # it has taken its turn; the task that sends has not begun
    withdrawn.cancel()
    await asyncio.wait([withdrawn])
    await trainer.optim_step(AdamParams())
    assert numbers(service) == [("optim_step", 2)]


async def test_a_call_cancelled_in_flight_goes_its_way_and_the_next_one_waits_for_it(
    service: ScriptedService, trainer: TrainingClient
) -> None:
    slow = Hold(Say(202, {"operation_id": "slow"}))
    service.answer("POST", "/trainer/forward_backward", slow)
    abandoned = asyncio.create_task(trainer.forward_backward([DATUM]))
    await slow.arrived.wait()
    abandoned.cancel()
    await asyncio.wait([abandoned])
    assert abandoned.cancelled()
    following = asyncio.create_task(trainer.optim_step(AdamParams()))
    await turns_of_the_loop()
    assert not following.done()
    slow.go.set()
    await following
    assert numbers(service) == [("forward_backward", 2), ("optim_step", 3)]


async def test_an_abandoned_call_that_fails_is_logged_and_stops_no_other(
    service: ScriptedService, trainer: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Hold(Say(422, {"detail": "too long"}))
    service.answer("POST", "/trainer/forward_backward", slow)
    abandoned = asyncio.create_task(trainer.forward_backward([DATUM]))
    await slow.arrived.wait()
    abandoned.cancel()
    await asyncio.wait([abandoned])
    slow.go.set()
    await trainer.optim_step(AdamParams())
    assert numbers(service) == [("forward_backward", 2), ("optim_step", 2)]
    assert any(
        "forward_backward failed after its caller was cancelled" in record.getMessage() for record in caplog.records
    )


async def test_a_time_limit_around_a_call_cancels_it(service: ScriptedService, trainer: TrainingClient) -> None:
    slow = Hold(Say(202, {"operation_id": "slow"}))
    service.answer("POST", STEP, slow)

    async def expire(limit: asyncio.Timeout) -> None:
        await slow.arrived.wait()
        limit.reschedule(asyncio.get_running_loop().time())

    with pytest.raises(TimeoutError):  # noqa: PT012 - the limit must expire within the block
        async with asyncio.timeout(None) as limit:
            expiring = asyncio.create_task(expire(limit))
            await trainer.optim_step(AdamParams())
    await expiring
    slow.go.set()
    await trainer.save_state("after")
    assert numbers(service) == [("optim_step", 2), ("save_state", 3)]
