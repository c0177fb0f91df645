"""What a sampler may answer, and that nothing that was paid for is thrown away (data-plane 3.2, 3.5)."""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
from typing import Any

import pytest

from loops_async import (
    ApiError,
    AuthenticationError,
    BadRequestError,
    ConfigError,
    ExternalRef,
    InputError,
    LoopsError,
    LostAnswerError,
    NotReadyError,
    ProtocolError,
    SamplerTerminatedError,
    SamplingClient,
    SamplingParams,
    ServerError,
    ServerlessDeployment,
    ServiceClient,
    TrainingClient,
    sampling,
)
from loops_async._http.endpoint import Endpoint
from tests.support.clock import Clock
from tests.support.limits import expire_when
from tests.support.scripted import KEY, MODEL, Reply, Say, ScriptedService, hang_up, hang_up_in_the_body, name_of

SAMPLE = "/sampler/sample"
STATUS = "/v1/models/m1/deployments/d1"


def choice(**changes: Any) -> dict[str, Any]:
    return {
        "index": 0,
        "text": "x",
        "finish_reason": "stop",
        "logprobs": {"tokens": ["token_id:5", "token_id:6"], "token_logprobs": [-0.5, -0.25]},
        "token_ids": [5, 6],
        **changes,
    }


@pytest.fixture
def says(service: ScriptedService) -> Any:
    """Let the sampler give these choices next."""

    def says(*choices: Any, **headers: str) -> None:
        service.answer("POST", SAMPLE, Say(body={"choices": list(choices)}, headers=headers))

    return says


async def test_an_ordinary_answer(sampler: SamplingClient, service: ScriptedService) -> None:
    body = {"id": "cmpl-1", "choices": [choice(), choice(index=1, finish_reason="length")], "usage": {"x": 1}}
    service.answer("POST", SAMPLE, Say(body=body, headers={"x-trainers-policy-version": "7"}))
    answer = await sampler.sample([1, 2], 2)
    first, second = answer.sequences
    assert (first.tokens, first.logprobs, first.stop_reason, first.text) == ([5, 6], [-0.5, -0.25], "stop", "x")
    assert second.stop_reason == "length"
    assert answer.policy_version == 7
    assert answer.prompt_logprobs is answer.topk_prompt_logprobs is None
    assert answer.request_id is None


@pytest.mark.parametrize("name", ["X-Request-Id", "X-Baseten-Request-Id"])
async def test_an_answer_has_the_id_of_its_request(name: str, sampler: SamplingClient, says: Any) -> None:
    says(choice(), **{name: f"req-7 {KEY}"})
    assert (await sampler.sample([1])).request_id == "req-7 ***"


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"finish_reason": "content_filter"}, "stop_reason", "content_filter"),
        ({"finish_reason": 7}, "stop_reason", "7"),
        ({"finish_reason": None}, "stop_reason", "length"),
        ({"token_ids": None}, "tokens", [5, 6]),
        ({"token_ids": None, "logprobs": {"tokens": [5, "6"], "token_logprobs": [-1, -1]}}, "tokens", [5, 6]),
        ({"logprobs": None}, "logprobs", None),
        ({"text": None}, "text", None),
        ({"token_ids": [], "logprobs": {"tokens": [], "token_logprobs": []}}, "tokens", []),
        ({"logprobs": {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0]}}, "tokens", [5, 6]),
        ({"stop_reason": 13, "matched_stop": "x", "surprise": [{}]}, "tokens", [5, 6]),
    ],
    ids=repr,
)
async def test_odd_answers_are_read(
    sampler: SamplingClient, says: Any, changes: dict[str, Any], field: str, value: Any
) -> None:
    says(choice(**changes))
    [sequence] = (await sampler.sample([1])).sequences
    assert getattr(sequence, field) == value


async def test_a_missing_logprob_is_nan_and_the_others_stay(sampler: SamplingClient, says: Any) -> None:
    says(choice(logprobs={"tokens": [], "token_logprobs": [None, -0.25]}), choice())
    first, second = (await sampler.sample([1], 2)).sequences
    assert first.logprobs == pytest.approx([math.nan, -0.25], nan_ok=True)
    assert second.logprobs == [-0.5, -0.25]


async def test_too_few_logprobs_are_filled_with_nan(
    sampler: SamplingClient, says: Any, caplog: pytest.LogCaptureFixture
) -> None:
    says(choice(logprobs={"tokens": [], "token_logprobs": [-0.5]}))
    [sequence] = (await sampler.sample([1])).sequences
    assert sequence.logprobs == pytest.approx([-0.5, math.nan], nan_ok=True)
    assert "1 logprobs for 2 tokens" in caplog.text


async def test_a_nan_that_is_no_json_is_read(sampler: SamplingClient, service: ScriptedService) -> None:
    body = '{"choices": [{"text": "a", "token_ids": [3], "logprobs": {"token_logprobs": [NaN]}}]}'
    service.answer("POST", SAMPLE, Say(200, body))
    [sequence] = (await sampler.sample([1])).sequences
    assert sequence.tokens == [3]
    assert sequence.logprobs == pytest.approx([math.nan], nan_ok=True)


async def test_text_is_kept_where_tokens_have_other_names(
    sampler: SamplingClient, says: Any, caplog: pytest.LogCaptureFixture
) -> None:
    says(choice(token_ids=None, logprobs={"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0]}))
    [sequence] = (await sampler.sample([1])).sequences
    assert (sequence.text, sequence.tokens) == ("x", [])
    assert "only the text is known" in caplog.text


async def test_one_part_that_cannot_be_read_costs_nothing_else(
    sampler: SamplingClient, says: Any, caplog: pytest.LogCaptureFixture
) -> None:
    says(choice(prompt_logprobs={"no": "list"}, routed_experts_ref={"uri": 1}), {"text": "alone"}, None)
    answer = await sampler.sample([1, 2], 3)
    whole, text_only, nothing = answer.sequences
    assert (whole.tokens, whole.routed_experts) == ([5, 6], None)
    assert answer.prompt_logprobs is None
    assert (text_only.text, text_only.tokens) == ("alone", [])
    assert nothing.tokens == []
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 2


NAMES = '"logprobs": {"tokens": ["token_id:5", "token_id:6"], "token_logprobs": [-0.5, -0.25]}'


@pytest.mark.parametrize(
    "tokens",
    [
        '["token_id:5","token_id:6"]',
        '[ "token_id:5" , "token_id:6"\t]',
        "[5, 6]",
        '["token_id:5", 6]',
        '["5", "6"]',
        '["5", 6.0]',
        '["token\\u005fid:5", "token_id:6"]',
    ],
)
async def test_ids_are_read_from_the_names_of_tokens(
    sampler: SamplingClient, service: ScriptedService, tokens: str
) -> None:
    body = f'{{"choices": [{{"text": "x", "logprobs": {{"tokens": {tokens}, "token_logprobs": [-1.0, -2.0]}}}}]}}'
    service.answer("POST", SAMPLE, Say(200, body))
    [sequence] = (await sampler.sample([1])).sequences
    assert (sequence.tokens, sequence.logprobs) == ([5, 6], [-1.0, -2.0])


@pytest.mark.parametrize("tokens", [["2nd", "3rd"], ["to", "ken"], ["token_id:2nd", "token_id:3"], ["token_id:", "1"]])
async def test_text_that_looks_like_the_names_of_tokens_is_not_read_as_ids(
    sampler: SamplingClient, says: Any, tokens: list[str]
) -> None:
    says(choice(token_ids=None, logprobs={"tokens": tokens, "token_logprobs": [-1.0, -2.0]}))
    [sequence] = (await sampler.sample([1])).sequences
    assert (sequence.text, sequence.tokens) == ("x", [])


@pytest.mark.parametrize(
    "odd", ["[5, null]", "[18446744073709551617, 6]", f"[{'9' * 5000}, 6]", '["a", "b"]', "[5.5, 6]"]
)
async def test_ids_that_are_none_leave_the_names(sampler: SamplingClient, service: ScriptedService, odd: str) -> None:
    service.answer("POST", SAMPLE, Say(200, f'{{"choices": [{{"text": "x", "token_ids": {odd}, {NAMES}}}]}}'))
    [sequence] = (await sampler.sample([1])).sequences
    assert (sequence.text, sequence.tokens, sequence.logprobs) == ("x", [5, 6], [-0.5, -0.25])


DEEP = "[" * 5000


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"choices": [{"text": "\xf0\x9f", "token_ids": [7]}]}', "\ufffd"),
        (b'\xef\xbb\xbf{"choices": [{"text": "x", "token_ids": [7]}]}', "x"),
        (rb'{"choices": [{"text": "a\ud83d", "token_ids": [7]}]}', "a\ufffd"),
        (rb'{"choices": [{"text": "x", "token_ids": [7], "routed_experts_ref": {"\ud83d": 1}}]}', "x"),
        (f'{{"choices": [{{"text": "x", "token_ids": [7]}}], "later": {DEEP}'.encode(), "x"),
        (b'{"choices": [{"text": "x", "token_ids": [7]}, {"text": "cut', "x"),
        (b'{"choices": [{"text": "x", "token_ids": [7]}]} and more', "x"),
        (f'{{"choices": [{{"text": "x", "token_ids": [7]}}], "usage": {"9" * 5000}}}'.encode(), "x"),
        (b'{"choices": [{"text": "x", "token_ids": [7], "logprobs": 1e999}]}', "x"),
    ],
    ids=["utf-8", "byte order mark", "surrogate", "surrogate in a key", "deep", "cut", "more", "5000 digits", "1e999"],
)
async def test_a_damaged_answer_keeps_what_can_be_read(
    sampler: SamplingClient, service: ScriptedService, body: bytes, text: str
) -> None:
    service.answer("POST", SAMPLE, Say(200, body))
    [sequence] = (await sampler.sample([1])).sequences
    assert (sequence.text, sequence.tokens) == (text, [7])


async def test_one_position_that_cannot_be_read_costs_no_other(sampler: SamplingClient, says: Any) -> None:
    says(choice(prompt_logprobs=[None, {"8": {"logprob": "?"}}, {"9": {"logprob": -0.5}, "9" * 5000: {"logprob": -1}}]))
    answer = await sampler.sample([7, 8, 9], 1, None, True, 2)
    assert answer.prompt_logprobs == [None, None, -0.5]
    assert answer.topk_prompt_logprobs == [None, None, [(9, -0.5)]]


async def test_captured_routing_is_passed_on(sampler: SamplingClient, says: Any) -> None:
    says(choice(routed_experts_ref={"uri": "bt://loops:r/sequences/x", "version": 2}))
    [sequence] = (await sampler.sample([1], include_routed_experts=True)).sequences
    assert sequence.routed_experts == ExternalRef(uri="bt://loops:r/sequences/x", version=2)


async def test_fields_may_be_missing(sampler: SamplingClient, service: ScriptedService) -> None:
    service.answer("POST", SAMPLE, Say(body={"choices": [{"logprobs": {"tokens": ["token_id:5"]}}]}))
    [sequence] = (await sampler.sample([1])).sequences
    assert sequence.tokens == [5]
    assert sequence.stop_reason == "length"


@pytest.mark.parametrize(("prompt", "tokens"), [([5], [5, 6]), ([5, 6], [5, 6]), ([5, 6], [5, 6, 5, 6])])
async def test_a_completion_that_repeats_the_prompt_is_not_cut(
    sampler: SamplingClient, service: ScriptedService, prompt: list[int], tokens: list[int]
) -> None:
    body: dict[str, Any] = {"choices": [choice(token_ids=tokens, logprobs={"token_logprobs": [-1.0] * len(tokens)})]}
    for usage in ({}, {"usage": {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}}):
        service.answer("POST", SAMPLE, Say(body={**body, **usage}))
        [sequence] = (await sampler.sample(prompt)).sequences
        assert sequence.tokens == tokens
        assert sequence.logprobs == [-1.0] * len(tokens)


async def test_a_count_that_hints_at_an_echo_does_not_cut_what_is_none(
    sampler: SamplingClient, service: ScriptedService
) -> None:
    body = {"choices": [choice(token_ids=[7, 6])], "usage": {"completion_tokens": 1}}
    service.answer("POST", SAMPLE, Say(body=body))
    assert (await sampler.sample([5])).sequences[0].tokens == [7, 6]


async def test_an_echo_is_cut_where_the_answer_counts_it_out(sampler: SamplingClient, service: ScriptedService) -> None:
    echoes = [
        choice(token_ids=[1, 2, 9], logprobs={"token_logprobs": [None, -0.1, -0.2]}),
        choice(token_ids=[1, 2, 1, 2], logprobs={"token_logprobs": [None, -0.1, -0.3, -0.4]}),
    ]
    usage = {"prompt_tokens": 2, "completion_tokens": 3}
    service.answer("POST", SAMPLE, Say(body={"choices": echoes, "usage": usage}))
    sequences = (await sampler.sample([1, 2], 2)).sequences
    assert [one.tokens for one in sequences] == [[9], [1, 2]]
    assert [one.logprobs for one in sequences] == [[-0.2], [-0.3, -0.4]]


async def test_prompt_logprobs(sampler: SamplingClient, says: Any) -> None:
    scored = [
        None,
        {"8": {"logprob": -2.0, "rank": 3, "decoded_token": "a"}, "9": {"logprob": -0.1, "rank": 1}},
        {"9": {"logprob": None}, "token?": {"logprob": -9.0}},
    ]
    says(choice(prompt_logprobs=scored), choice(prompt_logprobs=scored))
    answer = await sampler.sample([7, 8, 9], 2, None, True, 1)
    assert answer.prompt_logprobs == [None, -2.0, None]
    assert answer.topk_prompt_logprobs == [None, [(9, -0.1)], []]


async def test_an_expanded_prompt_wins_over_ours(sampler: SamplingClient, says: Any) -> None:
    says(choice(prompt_token_ids=[7, 99, 99], prompt_logprobs=[None, {"99": {"logprob": -1.0}}, {"99": {}}]))
    answer = await sampler.sample([7, 8], include_prompt_logprobs=True)
    assert answer.prompt_token_ids == [7, 99, 99]
    assert answer.prompt_logprobs == [None, -1.0, None]


@pytest.mark.parametrize(
    ("header", "version"), [("0", 0), ("12", 12), ("", None), ("new", None), ("-1", None), ("9" * 5000, None)]
)
async def test_the_version_in_the_header(
    sampler: SamplingClient, service: ScriptedService, header: str, version: int | None
) -> None:
    service.answer("POST", SAMPLE, Say(body={"choices": []}, headers={"x-trainers-policy-version": header}))
    assert (await sampler.sample([1])).policy_version == version


@pytest.mark.parametrize(
    "body", ["<html>Hello</html>", "", "{}", '{"hello": 5}', "[]", '{"choices": null}', '{"choices": [', "5", "[" * 100]
)
async def test_what_is_no_completion_at_all(sampler: SamplingClient, service: ScriptedService, body: str) -> None:
    service.answer("POST", SAMPLE, Say(200, body))
    with pytest.raises(ProtocolError, match="not a completion") as odd:
        await sampler.sample([1])
    assert body in str(odd.value)
    assert len(service.seen_at("POST", SAMPLE)) == 1, "it was paid for; asking again would pay twice"


async def test_a_sampler_that_answers_with_the_key_does_not_get_it_printed(
    sampler: SamplingClient, service: ScriptedService
) -> None:
    service.answer("POST", SAMPLE, Say(200, {"headers": {"Authorization": f"Bearer {KEY}"}}))
    with pytest.raises(ProtocolError) as odd:
        await sampler.sample([1])
    assert KEY not in str(odd.value)


# --- refusals and time ---


async def test_a_refusal_is_raised_at_once(sampler: SamplingClient, service: ScriptedService, quick: Clock) -> None:
    body = {"error": {"message": "prompt is too long", "type": "BadRequestError", "code": 400}}
    service.answer("POST", SAMPLE, Say(400, body))
    with pytest.raises(BadRequestError, match="prompt is too long"):
        await sampler.sample([1])
    assert len(service.seen_at("POST", SAMPLE)) == 1
    assert len(service.seen_at("GET", STATUS)) == 1, "its state tells a bad request from a model that is deploying"


@pytest.mark.parametrize("status", [400, 404])
async def test_a_model_that_is_still_deploying_is_waited_for(
    sampler: SamplingClient, service: ScriptedService, quick: Clock, status: int
) -> None:
    service.answer("POST", SAMPLE, Say(status, {"error": "model is not ready"}))
    service.answer("GET", STATUS, Say(body={"status": "LOADING_MODEL"}), Say(body={"status": "LOADING_MODEL"}))
    assert (await sampler.sample([1])).sequences
    assert len(service.seen_at("POST", SAMPLE)) == 2


async def test_a_model_that_is_gone_is_said_to_be(
    sampler: SamplingClient, service: ScriptedService, quick: Clock
) -> None:
    service.answer("POST", SAMPLE, Say(404, {"error": "no such model"}))
    service.answer("GET", STATUS, Say(body={"status": "INACTIVE"}))
    with pytest.raises(SamplerTerminatedError, match=r"d1.*INACTIVE") as gone:
        await sampler.sample([1])
    assert (gone.value.deployment_id, gone.value.status) == ("d1", "INACTIVE")


@pytest.mark.parametrize(
    "first", [Say(429, "<html>"), Say(503, {"error": "busy"}), Say(503, "<html>", {"Retry-After": "0"})], ids=repr
)
async def test_a_sampler_that_turns_a_request_away_is_asked_again(
    sampler: SamplingClient, service: ScriptedService, quick: Clock, first: Say
) -> None:
    service.answer("POST", SAMPLE, first, Say(first.status, {"error": "busy"}, {"Retry-After": "3"}))
    assert (await sampler.sample([1])).sequences
    attempts = service.seen_at("POST", SAMPLE)
    assert len(attempts) == 3
    assert len({seen.headers["Idempotency-Key"] for seen in attempts}) == 1
    assert quick.pauses[-1] == 3.0


@pytest.mark.parametrize(
    ("status", "kind"), [(401, AuthenticationError), (422, BadRequestError), (500, ServerError), (418, ApiError)]
)
async def test_other_refusals_are_final(
    sampler: SamplingClient, service: ScriptedService, quick: Clock, status: int, kind: type[ApiError]
) -> None:
    service.answer("POST", SAMPLE, Say(status, {"error": "no"}))
    with pytest.raises(kind):
        await sampler.sample([1])
    assert len(service.seen_at("POST", SAMPLE)) == 1


async def test_a_deactivated_model_is_final(sampler: SamplingClient, service: ScriptedService, quick: Clock) -> None:
    headers = {"X-Baseten-Error-Source": "01", "X-Baseten-Error-Code": "631"}
    service.answer("POST", SAMPLE, Say(503, {"error": "model is deactivated"}, headers))
    with pytest.raises(ServerError, match="deactivated"):
        await sampler.sample([1])
    assert len(service.seen_at("POST", SAMPLE)) == 1


@pytest.mark.parametrize(
    "lost",
    [
        Say(408, {"error": "late"}),
        Say(502, "<html>"),
        Say(503, "upstream connect error"),
        Say(504, {"error": "late"}, {"Retry-After": "1"}),
        hang_up,
        hang_up_in_the_body,
    ],
    ids=name_of,
)
async def test_a_sample_that_may_have_been_paid_is_not_repeated(
    sampler: SamplingClient, service: ScriptedService, quick: Clock, lost: Reply
) -> None:
    service.answer("POST", SAMPLE, lost)
    with pytest.raises(LostAnswerError, match="may have been generated and paid for") as failed:
        await sampler.sample([1])
    assert not failed.value.retryable
    assert isinstance(failed.value.__cause__, LoopsError)
    assert (len(service.seen_at("POST", SAMPLE)), quick.pauses) == (1, [])


async def test_a_sampler_that_does_not_serve_the_version_yet_is_asked_again(
    trainer: TrainingClient, service: ScriptedService, quick: Clock
) -> None:
    sampler = await trainer.save_weights_and_get_sampling_client()
    service.answer("POST", SAMPLE, Say(408, ""), Say(408, {"error": "not yet"}))
    assert (await sampler.sample([1])).sequences
    assert len(service.seen_at("POST", SAMPLE)) == 3


async def test_the_408_of_a_gateway_is_not_the_sampler_that_lacks_the_version(
    trainer: TrainingClient, service: ScriptedService, quick: Clock
) -> None:
    sampler = await trainer.save_weights_and_get_sampling_client()
    service.answer("POST", SAMPLE, Say(408, "<html>"))
    with pytest.raises(LostAnswerError, match="may have been generated and paid for"):
        await sampler.sample([1])
    assert len(service.seen_at("POST", SAMPLE)) == 1


async def test_a_sampler_that_stays_busy_is_given_up_in_time(
    client: ServiceClient, service: ScriptedService, quick: Clock
) -> None:
    sampler = await client.create_sampling_client(MODEL, ready_timeout=100.0)
    service.always("POST", SAMPLE, Say(503, {"error": "busy"}))
    quick.now = 0.0
    with pytest.raises(ServerError, match="busy"):
        await sampler.sample([1])
    assert quick.now == pytest.approx(100.0)


async def test_a_full_queue_is_asked_again_when_it_says(
    client: ServiceClient, service: ScriptedService, quick: Clock
) -> None:
    serverless = service.sampler(model_id=None, deployment_id=None)
    service.answer("POST", "/v1/loops/samplers", Say(body={"sampler": serverless}))
    sampler = await client.create_sampling_client(MODEL)
    service.answer("POST", SAMPLE, Say(503, {"error": "full"}, {"Retry-After": "3"}))
    service.answer("POST", SAMPLE, Say(body={"choices": [choice()]}))
    assert (await sampler.sample([1])).sequences[0].tokens == [5, 6]
    assert quick.pauses == [3.0]


@pytest.mark.parametrize("lost", [Say(504, "<html>"), Say(202, "<html>"), Say(202, {"operation_id": "o"})], ids=repr)
async def test_a_queued_sample_is_repeated_with_its_key_and_then_said_to_be_lost(
    client: ServiceClient, service: ScriptedService, quick: Clock, lost: Say
) -> None:
    serverless = service.sampler(model_id=None, deployment_id=None)
    service.answer("POST", "/v1/loops/samplers", Say(body={"sampler": serverless}))
    sampler = await client.create_sampling_client(MODEL)
    service.always("POST", SAMPLE, lost)
    service.always("GET", "/sampler/operations/o", Say(502, ""))
    with pytest.raises(LostAnswerError, match="may have been generated and paid for; it was cancelled"):
        await sampler.sample([1])
    keys = {seen.headers["Idempotency-Key"] for seen in service.seen_at("POST", SAMPLE)}
    assert len(keys) == 1
    operation = "o" if lost.body == {"operation_id": "o"} else keys.pop()
    assert len(service.seen_at("POST", f"/sampler/operations/{operation}/cancel")) == 1


async def test_a_sample_that_a_queue_turned_away_was_not_paid(
    client: ServiceClient, service: ScriptedService, quick: Clock
) -> None:
    serverless = service.sampler(model_id=None, deployment_id=None)
    service.answer("POST", "/v1/loops/samplers", Say(body={"sampler": serverless}))
    sampler = await client.create_sampling_client(MODEL, ready_timeout=100.0)
    service.always("POST", SAMPLE, Say(503, {"error": "full"}, {"Retry-After": "3"}))
    with pytest.raises(ServerError, match="full") as full:
        await sampler.sample([1])
    assert full.value.retryable


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": "hello"}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"sampling_params": {"max_tokens": 5}}, "sampling_params"),
        ({"sampling_params": SamplingParams(max_tokens=0)}, "sampling_params.max_tokens"),
        ({"sampling_params": SamplingParams(temperature=-1.0)}, "sampling_params.temperature"),
        ({"sampling_params": SamplingParams(temperature=math.nan)}, "sampling_params.temperature"),
        ({"sampling_params": SamplingParams(top_p=0.0)}, "sampling_params.top_p"),
        ({"sampling_params": SamplingParams(top_k=-2)}, "sampling_params.top_k"),
        ({"sampling_params": SamplingParams(stop=["a", 1])}, "sampling_params.stop"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs"),
        ({"affinity_key": ""}, "affinity_key"),
        ({"affinity_key": "a\nX-Run-Id: other"}, "affinity_key"),
        ({"affinity_key": 5}, "affinity_key"),
    ],
    ids=repr,
)
async def test_bad_arguments_are_named_and_nothing_is_sent(
    sampler: SamplingClient, service: ScriptedService, arguments: dict[str, Any], path: str
) -> None:
    with pytest.raises(InputError) as refused:
        await sampler.sample(**{"prompt": [1], **arguments})
    assert refused.value.path == path
    assert not service.seen


# --- clients are values ---


async def test_a_thousand_clients_are_nothing(trainer: TrainingClient, service: ScriptedService) -> None:
    tasks = len(asyncio.all_tasks())
    published = await trainer.save_weights_and_get_sampling_client("x")
    clients = [pickle.loads(pickle.dumps(published)) for _ in range(1000)]
    assert len(asyncio.all_tasks()) <= tasks
    assert len({repr(one) for one in clients}) == 1


async def test_a_client_pickles_without_the_key(sampler: SamplingClient) -> None:
    assert KEY.encode() not in pickle.dumps(sampler)
    assert KEY not in repr(sampler)


# --- the version that was published ---

VERSION = "/sampler/trainers_policy_version"


async def test_publishing_returns_when_the_sampler_serves_the_version(
    trainer: TrainingClient, service: ScriptedService, quick: Clock
) -> None:
    service.answer(
        "GET",
        VERSION,
        Say(body={"policy_version": None}),
        Say(502, "<html>"),
        Say(body={"policy_version": 0}),
        Say(200, "odd"),
        hang_up,
        Say(body={"policy_version": 3}),
    )
    sampler = await trainer.save_weights_and_get_sampling_client("x")
    assert sampler.min_policy_version == 1
    assert len(service.seen_at("GET", VERSION)) == 6
    assert max(quick.pauses) < 2.3


@pytest.mark.parametrize("status", [404, 501])
async def test_a_sampler_that_does_not_tell_its_version_is_gated_by_each_request(
    trainer: TrainingClient, service: ScriptedService, status: int
) -> None:
    service.answer("GET", VERSION, Say(status, {"error": "no such route"}))
    sampler = await trainer.save_weights_and_get_sampling_client("x")
    await sampler.sample([1])
    assert service.seen_at("POST", SAMPLE)[0].headers["X-Min-Policy-Version"] == "1"


async def test_a_version_that_never_comes_is_given_up(
    trainer: TrainingClient, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "VERSION_SECONDS", 0.02)
    expire_when(lambda: len(service.seen_at("GET", VERSION)) > 1, monkeypatch, seconds=0.02)
    service.always("GET", VERSION, Say(body={"policy_version": 0}))
    with pytest.raises(NotReadyError, match=r"does not serve version 1 .*last answer was: it serves version 0"):
        await trainer.save_weights_and_get_sampling_client("x")


async def test_the_base_url_of_a_pickle_must_be_one() -> None:
    endpoint = Endpoint(deployment=ServerlessDeployment(base_url="nowhere"), base_model=MODEL, headers={})
    with pytest.raises(ConfigError, match="base_url must be an absolute http or https URL"):
        await sampling.sampling_client(endpoint).sample([1])
