"""A generation is paid for when it arrives: whatever can be read of an odd answer is kept."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from aiohttp import web

from loops_async import ProtocolError, SamplingClient
from loops_async._sampling.completions import read_completions
from loops_async.types import ExternalRef
from loops_local import LocalService


def choice(tokens: list[int] | None = None, logprobs: list[Any] | None = None, **others: Any) -> dict[str, Any]:
    """Return a completion as a sampler sends it, with `others` in place of or beside the usual."""
    tokens = [7, 8] if tokens is None else tokens
    names = [f"token_id:{token}" for token in tokens]
    usual = {
        "index": 0,
        "text": "ab",
        "finish_reason": "stop",
        "logprobs": {"tokens": names, "token_logprobs": [-0.5] * len(tokens) if logprobs is None else logprobs},
        "token_ids": tokens,
    }
    return usual | others


async def answered(local: LocalService, sampler: SamplingClient, *choices: Any, **body: Any) -> Any:
    local.faults.answer("POST */sample", 200, {"choices": list(choices), **body})
    return await sampler.sample([1, 2], len(choices))


@pytest.mark.parametrize("reason", ["content_filter", "abort", 7])
async def test_an_unknown_finish_reason_is_kept_as_it_came(
    local: LocalService, sampler: SamplingClient, reason: Any
) -> None:
    answer = await answered(local, sampler, choice(finish_reason=reason))
    assert answer.sequences[0].stop_reason == str(reason)
    assert answer.sequences[0].tokens == [7, 8]


async def test_a_missing_finish_reason_means_length(local: LocalService, sampler: SamplingClient) -> None:
    answer = await answered(local, sampler, choice(finish_reason=None))
    assert answer.sequences[0].stop_reason == "length"


async def test_a_null_logprob_is_nan_and_the_others_stay(local: LocalService, sampler: SamplingClient) -> None:
    answer = await answered(local, sampler, choice(logprobs=[None, -0.25]), choice())
    first, second = answer.sequences
    assert math.isnan(first.logprobs[0])
    assert first.logprobs[1] == -0.25
    assert second.logprobs == [-0.5, -0.5]


async def test_missing_logprobs_leave_the_tokens(local: LocalService, sampler: SamplingClient) -> None:
    answer = await answered(local, sampler, choice(logprobs=None) | {"logprobs": None})
    assert answer.sequences[0].tokens == [7, 8]
    assert answer.sequences[0].logprobs is None


async def test_too_few_logprobs_are_filled_with_nan(
    local: LocalService, sampler: SamplingClient, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await answered(local, sampler, choice(logprobs=[-0.5]))
    assert answer.sequences[0].logprobs[0] == -0.5
    assert math.isnan(answer.sequences[0].logprobs[1])
    assert "1 logprobs for 2 tokens" in caplog.text


@pytest.mark.parametrize("names", [["token_id:7", "token_id:8"], ["7", "8"], [7, 8]])
async def test_tokens_are_read_from_their_names_where_ids_are_missing(
    local: LocalService, sampler: SamplingClient, names: list[Any]
) -> None:
    odd = choice(token_ids=None) | {"logprobs": {"tokens": names, "token_logprobs": [-1.0, -2.0]}}
    answer = await answered(local, sampler, odd)
    assert answer.sequences[0].tokens == [7, 8]
    assert answer.sequences[0].logprobs == [-1.0, -2.0]


async def test_text_is_kept_where_tokens_have_other_names(
    local: LocalService, sampler: SamplingClient, caplog: pytest.LogCaptureFixture
) -> None:
    odd = choice(token_ids=None) | {"logprobs": {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0]}}
    answer = await answered(local, sampler, odd)
    assert answer.sequences[0].text == "ab"
    assert answer.sequences[0].tokens == []
    assert "only their text is known" in caplog.text


async def test_one_part_that_cannot_be_read_costs_nothing_else(
    local: LocalService, sampler: SamplingClient, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await answered(
        local, sampler, choice(prompt_logprobs={"no": "list"}, routed_experts_ref={"uri": 1}), {"text": "alone"}, None
    )
    whole, text_only, nothing = answer.sequences
    assert whole.tokens == [7, 8]
    assert answer.prompt_logprobs is None
    assert whole.routed_experts is None
    assert (text_only.text, text_only.tokens) == ("alone", [])
    assert nothing.tokens == []
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 2


async def test_what_is_not_a_completion_is_an_error_that_shows_it(local: LocalService, sampler: SamplingClient) -> None:
    local.faults.answer("POST */sample", 200, {"hello": "world"})
    with pytest.raises(ProtocolError, match="hello"):
        await sampler.sample([1])


def test_the_nan_of_a_careless_service_is_read() -> None:
    body = b'{"choices": [{"text": "a", "token_ids": [3], "logprobs": {"token_logprobs": [NaN]}}]}'
    sequence = read_completions(body, prompt=[1], topk=0).sequences[0]
    assert sequence.tokens == [3]
    assert math.isnan((sequence.logprobs or [0.0])[0])


async def test_a_completion_that_repeats_its_prompt_is_not_cut(local: LocalService, sampler: SamplingClient) -> None:
    answer = await answered(local, sampler, choice([1, 2, 9]))
    assert answer.sequences[0].tokens == [1, 2, 9]
    answer = await answered(local, sampler, choice([1, 2, 9]), usage={"prompt_tokens": 2, "completion_tokens": 3})
    assert answer.sequences[0].tokens == [1, 2, 9]


async def test_an_echo_is_cut_where_the_answer_counts_it_out(local: LocalService, sampler: SamplingClient) -> None:
    answer = await answered(
        local,
        sampler,
        choice([1, 2, 9], [None, -0.1, -0.2]),
        choice([1, 2, 1, 2], [None, -0.1, -0.3, -0.4]),
        usage={"prompt_tokens": 2, "completion_tokens": 3},
    )
    assert [one.tokens for one in answer.sequences] == [[9], [1, 2]]
    assert [one.logprobs for one in answer.sequences] == [[-0.2], [-0.3, -0.4]]


async def test_prompt_logprobs_with_candidates(local: LocalService, sampler: SamplingClient) -> None:
    scored = [None, {"2": {"logprob": -1.5, "rank": 3}, "5": {"logprob": -0.5}, "odd": {"logprob": -9.0}}]
    local.faults.answer("POST */sample", 200, {"choices": [choice(prompt_logprobs=scored, prompt_token_ids=[1, 2])]})
    answer = await sampler.sample([1, 2], topk_prompt_logprobs=1)
    assert answer.prompt_logprobs == [None, -1.5]
    assert answer.topk_prompt_logprobs == [None, [(5, -0.5)]]
    assert answer.prompt_token_ids == [1, 2]


async def test_captured_routing_is_asked_for_and_handed_on(local: LocalService, sampler: SamplingClient) -> None:
    ref = {"uri": "bt://loops:r/sequences/x", "version": 2}
    asked = local.faults.answer("POST */sample", 200, {"choices": [choice(routed_experts_ref=ref)]})
    answer = await sampler.sample([1, 2], include_routed_experts=True)
    assert answer.sequences[0].routed_experts == ExternalRef(uri="bt://loops:r/sequences/x", version=2)
    assert len(asked) == 1


async def test_a_text_model_refuses_to_capture_routing(sampler: SamplingClient) -> None:
    with pytest.raises(Exception, match="no routed experts") as refused:
        await sampler.sample([1, 2], include_routed_experts=True)
    assert getattr(refused.value, "status", None) == web.HTTPUnprocessableEntity.status_code
