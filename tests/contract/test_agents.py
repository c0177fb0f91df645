"""Agents over real sockets: what they send and get, whatever goes wrong, and what is recorded of it."""

from __future__ import annotations

import asyncio
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import aiohttp
import msgspec
import pytest
from anyio import to_thread

import loops_sync
from loops_async import (
    AdamParams,
    AgentGateway,
    AgentRollout,
    ClosedError,
    ConfigError,
    ParsedReply,
    SamplingClient,
    TrainingClient,
)
from loops_async._agents.dialects.messages import Messages
from loops_async._agents.templates import ChatTemplate
from loops_local.engine.base import Completion, SampleJob, SampleOutcome
from tests.support import openai_stub
from tests.support.agents import WEATHER
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.colours import Colour
from tests.support.engines import WatchedEngine
from tests.support.patience import PATIENCE_SECONDS
from tests.support.templates import QWEN3, SMOLLM2
from tests.support.work import eventually

HI = [{"role": "user", "content": "hi"}]
CHAT = {"model": "m", "messages": HI}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
THOUGHT = "<think>\nhm\n</think>\n\n"


class Http:
    """A client of one rollout."""

    def __init__(self, rollout: AgentRollout, session: aiohttp.ClientSession) -> None:
        self.rollout = rollout
        self._session = session

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> AbstractAsyncContextManager[Any]:
        named = {"authorization": f"Bearer {self.rollout.api_key}", **headers}
        url = path if path.startswith("http") else f"{self.rollout.base_url}/{path}"
        return self._session.request(method, url, json=body, headers=named)

    async def post(self, path: str, body: Any, **headers: str) -> Any:
        """Return the body of an answer that must be a success."""
        async with self.send("POST", path, body, **headers) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def refused(self, path: str, body: Any, method: str = "POST", **headers: str) -> tuple[int, Any, Any]:
        """Return the status, the body and the headers of an answer."""
        async with self.send(method, path, body, **headers) as answer:
            return answer.status, await answer.json(), answer.headers

    async def raw(self, path: str, body: bytes, **headers: str) -> tuple[int, Any, Any]:
        """Send what need not be JSON; return the status, the body and the headers of the answer."""
        named = {"authorization": f"Bearer {self.rollout.api_key}", **headers}
        async with self._session.post(f"{self.rollout.base_url}/{path}", data=body, headers=named) as answer:
            return answer.status, await answer.json(), answer.headers

    async def events(self, path: str, body: Any) -> list[Any]:
        """Return the events of a stream, without its comments."""
        async with self.send("POST", path, {**body, "stream": True}) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.content_type == "text/event-stream"
            blocks = (await answer.text()).strip().split("\n\n")
        return [_parsed(block) for block in blocks if not block.startswith(":")]


def _parsed(block: str) -> Any:
    data = block.partition("data: ")[2]
    return msgspec.json.decode(data) if data.startswith("{") else data


class Script:
    """The texts that the engine answers with, one for each sample; the echo of the prompt when there is none."""

    def __init__(self, engine: WatchedEngine, tokenizer: ByteTokenizer) -> None:
        self.jobs: list[SampleJob] = []
        self.texts: list[str] = []
        self._echo = engine.sample
        self._tokenizer = tokenizer

    def sample(self, job: SampleJob) -> Future[SampleOutcome]:
        self.jobs.append(job)
        if not self.texts:
            return self._echo(job)
        tokens = self._tokenizer.encode(self.texts.pop(0) + "<|im_end|>", add_special_tokens=False)
        done = Completion(tokens=tokens, logprobs=[-0.5] * len(tokens), text="", finish_reason="stop")
        future: Future[SampleOutcome] = Future()
        future.set_result(SampleOutcome(completions=[done] * job.num_samples))
        return future


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer(QWEN3)


@pytest.fixture
def script(engine: WatchedEngine, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script(engine, tokenizer)
    monkeypatch.setattr(engine, "sample", script.sample)
    return script


@pytest.fixture
async def sampler(trainer: TrainingClient, script: Script) -> SamplingClient:
    return await trainer.save_weights_and_get_sampling_client("agents")


@pytest.fixture
async def gateway(colour: Colour, sampler: SamplingClient, tokenizer: ByteTokenizer) -> AsyncIterator[AgentGateway]:
    async with colour.gateway(sampler, tokenizer=tokenizer, grace=0.0) as gateway:
        yield gateway


@pytest.fixture
async def impatient(
    colour: Colour, sampler: SamplingClient, tokenizer: ByteTokenizer, session: aiohttp.ClientSession
) -> AsyncIterator[Http]:
    """A rollout whose streams begin at once."""
    async with colour.gateway(sampler, tokenizer=tokenizer, grace=0.0, stream_wait=0.0) as gateway:
        yield Http(gateway.rollout(), session)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def http(gateway: AgentGateway, session: aiohttp.ClientSession) -> AsyncIterator[Http]:
    async with gateway.rollout() as rollout:
        yield Http(rollout, session)


# --- answers ---------------------------------------------------------------------------------------------------------


async def test_a_tool_loop_is_one_sequence_and_its_datums_are_what_was_sampled(http: Http, script: Script) -> None:
    script.texts = [THOUGHT + "let me see " + CALL, "sunny"]
    first = await http.post("chat/completions", {**CHAT, "tools": [WEATHER]})
    [choice] = first["choices"]
    message = choice["message"]
    [call] = message["tool_calls"]
    assert (choice["finish_reason"], message["content"]) == ("tool_calls", "let me see")
    assert (message["reasoning_content"], call["function"]["name"]) == ("hm", "weather")
    assert call["function"]["arguments"] == '{"city": "Rome"}'

    result = {"role": "tool", "tool_call_id": call["id"], "content": "20 C"}
    second = await http.post("chat/completions", {**CHAT, "tools": [WEATHER], "messages": [*HI, message, result]})
    assert second["choices"][0]["message"]["content"] == "sunny"
    one, two = http.rollout.calls
    assert (one.id, two.id) == (first["id"], second["id"])
    assert (two.parent_id, two.branch, two.policy_version) == (one.id, None, 0)
    assert second["usage"]["prompt_tokens"] == len(two.prompt_tokens)

    [datum] = http.rollout.to_datums({one.id: 1.0, two.id: 2.0})
    whole = two.prompt_tokens + two.tokens
    assert datum.model_input.to_ints() == whole[:-1]
    advantages = [0.0] * len(one.prompt_tokens) + [1.0] * len(one.tokens)
    advantages += [0.0] * (len(two.prompt_tokens) - len(advantages)) + [2.0] * len(two.tokens)
    assert datum.loss_fn_inputs["advantages"].data == advantages[1:]
    assert datum.loss_fn_inputs["mask"].data == [float(each > 0) for each in advantages[1:]]
    assert datum.loss_fn_inputs["logprobs"].data == [-0.5 if each else 0.0 for each in advantages[1:]]
    assert datum.loss_fn_inputs["target_tokens"].data == whole[1:]


async def test_the_answer_carries_ids_and_logprobs_if_asked(http: Http, script: Script) -> None:
    script.texts = ["ab"]
    answer = await http.post("chat/completions", {**CHAT, "n": 2, "logprobs": True, "return_token_ids": True})
    calls = http.rollout.calls
    assert [call.id for call in calls] == [answer["id"], f"{answer['id']}-1"]
    assert answer["prompt_token_ids"] == calls[0].prompt_tokens
    for choice, call in zip(answer["choices"], calls, strict=True):
        assert choice["token_ids"] == call.tokens
        content = choice["logprobs"]["content"]
        assert [each["token"] for each in content] == ["a", "b", "<|im_end|>"]
        assert [each["logprob"] for each in content] == call.logprobs
    assert len(http.rollout.to_datums()) == 2


async def test_streams_have_the_answer_in_blocks(http: Http, script: Script) -> None:
    script.texts = [THOUGHT + "so " + CALL]
    body = {**CHAT, "tools": [WEATHER], "stream_options": {"include_usage": True}}
    *chunks, usage, done = await http.events("chat/completions", body)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[:3] == [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "so"}]
    [call] = deltas[3]["tool_calls"]
    assert (call["index"], call["type"], call["function"]["name"]) == (0, "function", "weather")
    assert call["id"] == (http.rollout.calls[0].reply or {})["tool_calls"][0]["id"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert {chunk["id"] for chunk in [*chunks, usage]} == {http.rollout.calls[0].id}
    assert usage["usage"]["completion_tokens"] == len(http.rollout.calls[0].tokens)
    assert done == "[DONE]"


async def test_completions_continue_by_text_and_by_tokens(http: Http, script: Script) -> None:
    script.texts = ["b", "d", "e"]
    first = await http.post("completions", {"model": "m", "prompt": "a", "return_token_ids": True})
    [choice] = first["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("b", "stop")
    await http.post("completions", {"model": "m", "prompt": "abc"})
    one, two = http.rollout.calls
    assert two.parent_id == one.id
    assert two.prompt_tokens == [*one.prompt_tokens, *one.tokens, *b"c"]
    ids = [*choice["prompt_token_ids"], *choice["token_ids"], 7]
    [*chunks, done] = await http.events("completions", {"model": "m", "prompt": ids, "logprobs": 0})
    assert chunks[0]["choices"][0]["logprobs"]["token_logprobs"] == [-0.5, -0.5]
    assert http.rollout.calls[2].prompt_tokens == ids
    assert http.rollout.calls[2].parent_id == one.id
    assert done == "[DONE]"


async def test_responses_and_their_items_continue(http: Http, script: Script) -> None:
    script.texts = [THOUGHT + "so " + CALL, "sunny"]
    tool = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]  # a part of a test's value
    body = {"model": "m", "instructions": "Be kind", "input": "hi", "tools": [tool]}
    first = await http.post("responses", body)
    assert [item["type"] for item in first["output"]] == ["reasoning", "message", "function_call"]
    result = {"type": "function_call_output", "call_id": first["output"][2]["call_id"], "output": "20 C"}
    items = [{"role": "user", "content": "hi"}, *first["output"], result]
    *_, last = await http.events("responses", {**body, "input": items})
    assert last["type"] == "response.completed"
    assert last["response"]["output"][0]["content"][0]["text"] == "sunny"
    one, two = http.rollout.calls
    assert (two.parent_id, two.branch, two.route) == (one.id, None, "responses")


async def test_messages_and_their_blocks_continue(http: Http, script: Script) -> None:
    script.texts = [THOUGHT + "so " + CALL, "sunny"]
    tool = {"name": "weather", "input_schema": {"type": "object"}}
    body = {"model": "m", "max_tokens": 99, "system": "Be kind", "messages": HI, "tools": [tool]}
    key = {"x-api-key": http.rollout.api_key}
    first = await http.post("messages", body, **key)
    assert [block["type"] for block in first["content"]] == ["text", "tool_use"]
    assert (first["stop_reason"], first["content"][1]["input"]) == ("tool_use", {"city": "Rome"})
    result = {"type": "tool_result", "tool_use_id": first["content"][1]["id"], "content": "20 C"}
    turns = [*HI, {"role": "assistant", "content": first["content"]}, {"role": "user", "content": [result]}]
    events = await http.events("messages", {**body, "messages": turns})
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert (deltas, events[-1]["type"]) == (["sunny"], "message_stop")
    one, two = http.rollout.calls
    assert (two.parent_id, two.branch, two.route) == (one.id, None, "messages")
    counted = await http.post("messages/count_tokens", body, **key)
    assert counted == {"input_tokens": len(one.prompt_tokens)}
    assert len(http.rollout.calls) == 2


async def test_streams_of_items_and_blocks_have_tool_calls(http: Http, script: Script) -> None:
    script.texts = ["so " + CALL] * 2
    tool = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]  # a part of a test's value
    events = await http.events("responses", {"input": "hi", "tools": [tool]})
    [arguments] = [each for each in events if each["type"] == "response.function_call_arguments.done"]
    assert (arguments["name"], arguments["arguments"]) == ("weather", '{"city": "Rome"}')
    items = [each["item"] for each in events if each["type"] == "response.output_item.done"]
    assert items == events[-1]["response"]["output"]
    assert [each["type"] for each in items] == ["message", "function_call"]
    assert [each["sequence_number"] for each in events] == [*range(len(events))]

    events = await http.events("messages", {**CHAT, "tools": [{"name": "weather", "input_schema": {}}]})
    begun = [each["content_block"] for each in events if each["type"] == "content_block_start"]
    assert [(each["type"], each.get("input")) for each in begun] == [("text", None), ("tool_use", {})]
    deltas = [each["delta"] for each in events if each["type"] == "content_block_delta"]
    assert deltas[1] == {"type": "input_json_delta", "partial_json": '{"city":"Rome"}'}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_models_are_whatever_an_agent_calls_them(http: Http, sampler: SamplingClient) -> None:
    async with http.send("GET", "models") as answer:
        assert [each["id"] for each in (await answer.json())["data"]] == [sampler.get_base_model()]
    async with http.send("GET", "models/any/name") as answer:
        assert (await answer.json())["id"] == "any/name"


async def test_the_gateway_decides_how_to_sample(
    colour: Colour, sampler: SamplingClient, tokenizer: ByteTokenizer, script: Script, session: aiohttp.ClientSession
) -> None:
    options: dict[str, Any] = {"defaults": {"max_tokens": 7, "top_p": 0.5}, "force": {"temperature": 1.0}}
    async with colour.gateway(sampler, tokenizer=tokenizer, max_context=60, **options) as gateway:
        http = Http(gateway.rollout(), session)
        await http.post("chat/completions", {**CHAT, "temperature": 0.1, "top_p": 0.25, "stop": ["x"], "seed": 3})
        await http.post("chat/completions", {**CHAT, "max_completion_tokens": 9999})
        prompt = len(http.rollout.calls[0].prompt_tokens)
        long = [{"role": "user", "content": "x" * 60}]
        status, body, _ = await http.refused("chat/completions", {**CHAT, "messages": long})
    first, second = (job.params for job in script.jobs)
    assert (first.max_tokens, first.temperature, first.top_p, first.stop, first.seed) == (7, 1.0, 0.25, ["x"], 3)
    assert second.max_tokens == 60 - prompt
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")


async def test_later_calls_use_the_sampler_that_is_assigned(
    colour: Colour, http: Http, gateway: AgentGateway, trainer: TrainingClient, script: Script
) -> None:
    await http.post("chat/completions", CHAT)
    await (await trainer.optim_step(AdamParams()))
    colour.own(gateway).sampler = colour.own(await trainer.save_weights_and_get_sampling_client("later"))
    await http.post("chat/completions", CHAT)
    assert [call.policy_version for call in http.rollout.calls] == [0, 1]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("chat/completions", {**CHAT, "logit_bias": {"1": 1}}, "unsupported_parameter", "logit_bias"),
        ("chat/completions", {**CHAT, "presence_penalty": 0.5}, "unsupported_parameter", "presence_penalty"),
        ("chat/completions", {**CHAT, "top_logprobs": 5}, "unsupported_parameter", "top_logprobs"),
        ("chat/completions", {**CHAT, "tool_choice": "required"}, "unsupported_value", "tool_choice"),
        ("chat/completions", {**CHAT, "temperature": "hot"}, "invalid_value", "temperature"),
        ("chat/completions", {**CHAT, "n": 129}, "invalid_value", "n"),
        ("chat/completions", {"model": "m"}, "missing_required_parameter", "messages"),
        ("chat/completions", {**CHAT, "messages": []}, "invalid_value", "messages"),
        (
            "chat/completions",
            {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "unsupported_value",
            "messages[0].content[0]",
        ),
        ("completions", {"prompt": ["a", "b"]}, "unsupported_value", "prompt"),
        ("completions", {"prompt": "a", "echo": True}, "unsupported_parameter", "echo"),
        ("completions", {"prompt": ""}, "invalid_value", "prompt"),
        ("responses", {"input": "a", "previous_response_id": "x"}, "unsupported_parameter", "previous_response_id"),
        ("responses", {"input": "a", "tools": [{"type": "web_search"}]}, "unsupported_value", "tools[0].type"),
        ("messages", {"messages": HI, "tool_choice": {"type": "any"}}, "unsupported_value", "tool_choice"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "unsupported_value", None),
        ("chat/completions", [], "invalid_value", None),
        ("chat/completions", {**CHAT, "max_tokens": 0}, "invalid_value", "max_tokens"),
        ("chat/completions", {**CHAT, "max_completion_tokens": 0}, "invalid_value", "max_completion_tokens"),
        ("chat/completions", {**CHAT, "stop": ["a", ""]}, "invalid_value", "stop"),
        ("chat/completions", {**CHAT, "stop": [None]}, "invalid_value", "stop[0]"),
        ("chat/completions", {**CHAT, "min_tokens": 5}, "unsupported_parameter", "min_tokens"),
        ("chat/completions", {**CHAT, "tools": [{"type": "custom"}]}, "unsupported_value", "tools[0].type"),
        ("chat/completions", {**CHAT, "tools": [{}]}, "missing_required_parameter", "tools[0].function"),
        ("chat/completions", {**CHAT, "response_format": {"type": "grammar"}}, "unsupported_value", "response_format"),
        (
            "chat/completions",
            {**CHAT, "response_format": {"type": "json_schema"}},
            "missing_required_parameter",
            "response_format",
        ),
        (
            "chat/completions",
            {**CHAT, "tools": [{"function": {"name": "x", "parameters": 3}}]},
            "invalid_value",
            "tools[0].function.parameters",
        ),
        (
            "chat/completions",
            {**CHAT, "chat_template_kwargs": {"messages": []}},
            "unsupported_parameter",
            "chat_template_kwargs.messages",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "function_call": {"name": "x"}}]},
            "unsupported_parameter",
            "messages[0].function_call",
        ),
        ("chat/completions", {"messages": [{"role": "alien"}]}, "unsupported_value", "messages[0].role"),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}]},
            "missing_required_parameter",
            "messages[0].tool_calls[0].function.name",
        ),
        ("completions", {}, "missing_required_parameter", "prompt"),
        ("completions", {"prompt": [-1]}, "invalid_value", "prompt[0]"),
        ("completions", {"prompt": [[10**30]]}, "invalid_value", "prompt[0][0]"),
        ("completions", {"prompt": "a", "logprobs": 5}, "unsupported_value", "logprobs"),
        ("responses", {}, "missing_required_parameter", "input"),
        ("responses", {"input": []}, "invalid_value", "input"),
        ("responses", {"input": "a", "max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ("responses", {"input": [{"role": "alien"}]}, "unsupported_value", "input[0].role"),
        ("responses", {"input": [{"type": "item_reference"}]}, "unsupported_value", "input[0].type"),
        ("responses", {"input": [{"type": "function_call"}]}, "missing_required_parameter", "input[0].name"),
        ("messages", {"messages": []}, "invalid_value", "messages"),
        ("messages", {"messages": HI, "stop_sequences": [""]}, "invalid_value", "stop_sequences"),
        ("messages", {"messages": [*HI, {"role": "assistant", "content": "I"}]}, "unsupported_value", "messages"),
        ("messages", {"messages": HI, "tools": [{"type": "bash", "name": "x"}]}, "unsupported_value", "tools[0].type"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "unsupported_value", "messages[0].role"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image"}]}]}]},
            "unsupported_value",
            "messages[0].content[0].content[0]",
        ),
    ],
)
async def test_what_would_change_the_meaning_is_refused(
    http: Http, path: str, body: Any, code: str, param: str | None, script: Script
) -> None:
    status, answer, headers = await http.refused(path, body)
    assert (status, answer["error"]["code"], headers["x-should-retry"]) == (400, code, "false")
    assert param is None or answer["error"]["param"] == param
    assert path != "messages" or answer["type"] == "error"
    assert script.jobs == []


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff", b"null", b"a=b", b'{"messages"', b"[" * 100_000, b'{"a":' * 5000, b'["\\ud800"]'],
    ids=["empty", "no UTF-8", "null", "a form", "cut", "deep", "deep and cut", "half a character"],
)
async def test_what_is_no_request_is_refused_in_the_form_of_each_api(http: Http, body: bytes) -> None:
    for path in ("chat/completions", "completions", "responses", "messages"):
        status, answer, _ = await http.raw(path, body, **{"content-type": "text/plain"})
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


async def test_a_body_that_cannot_be_unpacked_is_refused(http: Http) -> None:
    status, answer, _ = await http.raw("messages", b"x", **{"content-encoding": "gzip"})
    assert (status, answer["type"], answer["error"]["code"]) == (400, "error", "invalid_value")


async def test_a_fault_of_the_gateway_is_told_in_the_form_of_the_api(
    http: Http, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("here")

    monkeypatch.setattr(Messages, "answer", fail)
    status, answer, headers = await http.refused("messages", CHAT)
    assert (status, answer["error"]["type"], headers["x-should-retry"]) == (500, "api_error", "false")
    assert "ZeroDivisionError" in answer["error"]["message"]
    assert "failed to answer" in caplog.text
    assert http.rollout.api_key not in caplog.text


async def test_a_stream_that_fails_does_not_end_like_one_that_is_complete(
    http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Iterator[bytes]:
        yield b"data: {}\n\n"
        raise ZeroDivisionError("here")

    monkeypatch.setattr(Messages, "events", fail)
    [_, error] = await http.events("messages", CHAT)
    assert (error["type"], error["error"]["code"]) == ("error", "gateway_failed")


async def test_a_parser_that_fails_fails_the_call_alone(
    colour: Colour, sampler: SamplingClient, tokenizer: ByteTokenizer, session: aiohttp.ClientSession
) -> None:
    class Broken:
        name = "broken"

        def parse(self, text: str) -> ParsedReply:
            raise ZeroDivisionError(text)

    async with colour.gateway(sampler, tokenizer=tokenizer, tool_parser=Broken()) as gateway:
        http = Http(gateway.rollout(), session)
        status, answer, _ = await http.refused("chat/completions", {**CHAT, "tools": [WEATHER]})
        await http.post("chat/completions", CHAT)
    assert (status, answer["error"]["code"]) == (500, "gateway_failed")
    assert [call.status for call in http.rollout.calls] == ["failed", "ok"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {**CHAT, "structured_outputs": {"json": {"type": "object"}}}),
        (
            "chat/completions",
            {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}},
        ),
        ("responses", {"input": "a", "text": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}),
        ("messages", {**CHAT, "output_format": {"type": "json_schema", "schema": {"type": "object"}}}),
        ("messages", {**CHAT, "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}),
    ],
)
async def test_the_form_of_a_reply_is_asked_of_the_sampler(http: Http, script: Script, path: str, body: Any) -> None:
    script.texts = ["{}"]
    await http.post(path, body)
    assert script.jobs[0].params.structured_outputs == {"json": {"type": "object"}}


async def test_what_is_counted_need_not_be_answered(http: Http) -> None:
    turns = [*HI, {"role": "assistant", "content": "hello"}]
    counted = await http.post("messages/count_tokens", {**CHAT, "messages": turns})
    assert counted["input_tokens"] > (await http.post("messages/count_tokens", CHAT))["input_tokens"]


async def test_characters_at_which_clients_cut_lines_are_escaped_in_streams(http: Http, script: Script) -> None:
    said = "a\u2028b\u2029c\x85d"
    for path in ("chat/completions", "completions", "responses", "messages"):
        script.texts = [said]
        body = {"prompt": "hi"} if path == "completions" else {"input": "hi"} if path == "responses" else CHAT
        async with http.send("POST", path, {**body, "stream": True}) as answer:
            lines = (await answer.text()).splitlines()
        blocks = [_parsed(line) for line in lines if line.startswith("data: {")]
        assert any(said in _texts(block) for block in blocks)


def _texts(value: Any) -> list[str]:
    """Return every text in a JSON value."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _texts(part)]


async def test_the_bytes_of_a_part_of_a_character_are_not_invented(http: Http, script: Script) -> None:
    script.texts = ["aé"]
    answer = await http.post("chat/completions", {**CHAT, "logprobs": True})
    assert answer["choices"][0]["message"]["content"] == "aé"
    shown = [each["bytes"] for each in answer["choices"][0]["logprobs"]["content"]]
    assert shown[:3] == [[97], None, None]


async def test_turns_of_one_conversation_at_once_all_continue_it(http: Http, script: Script) -> None:
    script.texts = ["a"]
    first = await http.post("chat/completions", CHAT)
    turns = [*HI, first["choices"][0]["message"], {"role": "user", "content": "more"}]
    body = {**CHAT, "messages": turns, "max_tokens": 3}
    await asyncio.gather(*(http.post("chat/completions", body) for _ in range(5)))
    one, *others = http.rollout.calls
    assert [(call.parent_id, call.branch) for call in others] == [(one.id, None)] * 5
    sampled = sum(len(call.tokens) for call in http.rollout.calls)
    assert sum(each.mask.count(True) for each in http.rollout.trajectories()) == sampled


async def test_neutral_and_ignored_fields_change_nothing(
    colour: Colour, sampler: SamplingClient, tokenizer: ByteTokenizer, session: aiohttp.ClientSession
) -> None:
    async with colour.gateway(sampler, tokenizer=tokenizer, ignore=["logit_bias"]) as gateway:
        http = Http(gateway.rollout(), session)
        neutral = {"presence_penalty": 0, "logit_bias": {"1": 1}, "user": "me", "store": True, "functions": []}
        await http.post("chat/completions", {**CHAT, **neutral, "parallel_tool_calls": False, "metadata": {}})


async def test_only_the_key_of_an_open_rollout_is_let_in(
    gateway: AgentGateway, http: Http, session: aiohttp.ClientSession
) -> None:
    other = Http(gateway.rollout(), session)
    by_key = f"{gateway.url}/v1/chat/completions"
    await other.post(by_key, CHAT, authorization=f"bearer {other.rollout.api_key}")
    foreign = http.rollout.base_url + "/chat/completions"
    for path, key in ((foreign, other.rollout.api_key), (foreign, "sk-loops-x"), (by_key, "")):
        status, body, _ = await other.refused(path, CHAT, authorization=f"Bearer {key}")
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert key == "" or key not in str(body)
    await other.rollout.close()
    assert (await other.refused(by_key, CHAT))[0] == 401
    assert other.rollout.closed
    assert len(other.rollout.to_datums()) == 1
    basic = {"authorization": f"Basic {http.rollout.api_key}"}
    assert (await http.refused("chat/completions", CHAT, **basic))[0] == 401


async def test_web_pages_are_kept_out(http: Http) -> None:
    for headers in ({"Host": "evil.example"}, {"Host": "localhost:x"}, {"Origin": "http://evil.example"}):
        status, body, _ = await http.refused("chat/completions", CHAT, **headers)
        assert (status, body["error"]["type"]) == (403, "permission_error")
    async with http.send("GET", "models", Host="localhost:1") as answer:  # as through a tunnel
        assert answer.status == 200


async def test_unknown_routes_are_refused_in_the_form_of_their_api(http: Http) -> None:
    status, body, _ = await http.refused("embeddings", {})
    assert (status, body["error"]["code"]) == (404, "not_found")
    status, body, _ = await http.refused("messages/batches", {})
    assert (status, body["type"], body["error"]["type"]) == (404, "error", "not_found_error")
    status, body, _ = await http.refused("chat/completions", None, method="PUT")
    assert status == 405


async def test_a_large_body_is_refused(
    colour: Colour, sampler: SamplingClient, tokenizer: ByteTokenizer, session: aiohttp.ClientSession
) -> None:
    async with colour.gateway(sampler, tokenizer=tokenizer, max_body=100) as gateway:
        status, body, _ = await Http(gateway.rollout(), session).refused("messages", {"x": "x" * 200})
    assert (status, body["error"]["type"]) == (413, "request_too_large")


async def test_a_rollout_may_have_a_sampler_and_a_key_of_its_own(
    colour: Colour, gateway: AgentGateway, trainer: TrainingClient, session: aiohttp.ClientSession
) -> None:
    await (await trainer.optim_step(AdamParams()))
    own = await trainer.save_weights_and_get_sampling_client("own")
    http = Http(gateway.rollout(sampler=own, affinity_key="task-1"), session)
    await http.post("chat/completions", CHAT)
    assert http.rollout.calls[0].policy_version == 1
    for option in ({"affinity_key": "a\nb"}, {"max_calls": -1}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            colour.own(gateway).rollout(**option)


async def test_the_number_of_calls_has_a_limit(gateway: AgentGateway, session: aiohttp.ClientSession) -> None:
    http = Http(gateway.rollout(max_calls=1), session)
    await http.post("chat/completions", CHAT)
    status, body, _ = await http.refused("chat/completions", CHAT)
    assert (status, body["error"]["code"]) == (400, "rollout_limit")


async def test_templates_may_be_missing_or_refuse(
    colour: Colour, sampler: SamplingClient, session: aiohttp.ClientSession
) -> None:
    async with colour.gateway(sampler, tokenizer=ByteTokenizer()) as gateway:
        http = Http(gateway.rollout(), session)
        assert (await http.refused("chat/completions", CHAT))[1]["error"]["code"] == "chat_template_missing"
        await http.post("completions", {"prompt": "a"})
    async with colour.gateway(sampler, tokenizer=ByteTokenizer("{{ raise_exception('no') }}")) as gateway:
        http = Http(gateway.rollout(), session)
        assert (await http.refused("chat/completions", CHAT))[1]["error"]["code"] == "chat_template_error"
        [call] = http.rollout.calls
        assert (call.status, call.error) == ("failed", "the chat template refuses this: no")
        assert http.rollout.to_datums() == []


async def test_a_late_sample_is_a_timeout_that_no_sdk_repeats(
    gateway: AgentGateway, sampler: SamplingClient, engine: WatchedEngine, session: aiohttp.ClientSession
) -> None:
    engine.hold_samples()
    http = Http(gateway.rollout(sampler=sampler.with_options(timeout=0.05)), session)
    status, body, headers = await http.refused("chat/completions", CHAT)
    assert (status, body["error"]["code"], headers["x-should-retry"]) == (504, "sample_timeout", "false")


# --- connections -----------------------------------------------------------------------------------------------------


async def test_a_retry_joins_its_attempt_or_gets_the_recorded_answer(
    engine: WatchedEngine, script: Script, http: Http
) -> None:
    engine.hold_samples()
    first = asyncio.create_task(http.post("chat/completions", CHAT))
    await eventually(lambda: engine.waiting_samples == 1)
    retried = asyncio.create_task(http.post("chat/completions", CHAT, **{"x-stainless-retry-count": "1"}))
    engine.release_samples()
    assert (await first)["id"] == (await retried)["id"]
    equal = await http.post("chat/completions", CHAT, **{"x-stainless-retry-count": "0"})
    again = await http.post("chat/completions", CHAT, **{"x-stainless-retry-count": "1"})
    assert equal["id"] == again["id"] != (await first)["id"]
    assert len(script.jobs) == len(http.rollout.calls) == 2


async def test_a_retry_finds_the_attempt_whose_connection_was_lost(
    colour: Colour,
    sampler: SamplingClient,
    tokenizer: ByteTokenizer,
    engine: WatchedEngine,
    script: Script,
    session: aiohttp.ClientSession,
) -> None:
    async with colour.gateway(sampler, tokenizer=tokenizer, grace=PATIENCE_SECONDS) as gateway:
        http = Http(gateway.rollout(), session)
        engine.hold_samples()
        asked = asyncio.create_task(http.post("chat/completions", CHAT))
        await eventually(lambda: engine.waiting_samples == 1)
        asked.cancel()
        await asyncio.wait([asked])
        retried = asyncio.create_task(http.post("chat/completions", CHAT, **{"x-stainless-retry-count": "1"}))
        engine.release_samples()
        [call] = http.rollout.calls
        assert (await retried)["id"] == call.id
    assert len(script.jobs) == 1


async def test_a_lost_connection_cancels_its_sample(http: Http, engine: WatchedEngine) -> None:
    engine.hold_samples()
    asked = asyncio.create_task(http.post("chat/completions", CHAT))
    await eventually(lambda: engine.waiting_samples == 1)
    asked.cancel()
    with suppress(asyncio.CancelledError):
        await asked
    await eventually(lambda: engine.waiting_samples == 0)
    await eventually(lambda: http.rollout.calls[0].status == "cancelled")
    assert http.rollout.to_datums() == []


async def test_leaving_a_stream_cancels_its_sample(impatient: Http, engine: WatchedEngine) -> None:
    engine.hold_samples()
    async with impatient.send("POST", "responses", {"input": "hi", "stream": True}) as answer:
        assert await answer.content.readline() == b": waiting for the sampler\n"
        answer.close()
    await eventually(lambda: engine.waiting_samples == 0)
    await eventually(lambda: impatient.rollout.calls[0].status == "cancelled")


async def test_closing_answers_what_waits_and_cancels_its_sample(impatient: Http, engine: WatchedEngine) -> None:
    http = impatient
    engine.hold_samples()
    asked = asyncio.create_task(http.refused("chat/completions", CHAT))
    async with http.send("POST", "messages", {**CHAT, "stream": True}) as answer:
        assert await answer.content.readline() == b": waiting for the sampler\n"
        await eventually(lambda: engine.waiting_samples == 2)
        await http.rollout.close()
        last = (await answer.text()).strip().rpartition("data: ")[2]
    status, body, headers = await asked
    assert (status, body["error"]["code"], headers["x-should-retry"]) == (410, "rollout_closed", "false")
    assert msgspec.json.decode(last)["error"]["code"] == "rollout_closed"
    await eventually(lambda: engine.waiting_samples == 0)
    assert {call.status for call in http.rollout.calls} == {"cancelled"}


async def test_a_stream_begins_before_its_answer_if_that_takes_long(impatient: Http, engine: WatchedEngine) -> None:
    engine.hold_samples()
    async with impatient.send("POST", "chat/completions", {**CHAT, "stream": True}) as answer:
        assert await answer.content.readline() == b": waiting for the sampler\n"
        engine.release_samples()
        assert (await answer.text()).endswith("data: [DONE]\n\n")


async def test_leaving_the_gateway_closes_its_rollouts(
    colour: Colour, sampler: SamplingClient, tokenizer: ByteTokenizer, engine: WatchedEngine, session: Any
) -> None:
    engine.hold_samples()
    async with colour.gateway(sampler, tokenizer=tokenizer) as gateway:
        http = Http(gateway.rollout(), session)
        asked = asyncio.create_task(http.refused("chat/completions", CHAT))
        await eventually(lambda: engine.waiting_samples == 1)
    assert (await asked)[0] == 410
    assert http.rollout.closed
    await eventually(lambda: engine.waiting_samples == 0)
    with pytest.raises(ClosedError, match="with"):
        gateway.rollout()


# --- long texts ------------------------------------------------------------------------------------------------------


class Watched(ByteTokenizer):
    """Notes in which thread it works with how many characters or tokens."""

    def __init__(self, chat_template: str) -> None:
        super().__init__(chat_template)
        self.work: list[tuple[int, str]] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.work.append((len(text), threading.current_thread().name))
        return super().encode(text, add_special_tokens)

    def decode(self, tokens: Sequence[int], **options: bool) -> str:
        self.work.append((len(tokens), threading.current_thread().name))
        return super().decode(tokens, **options)


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
async def test_work_with_long_texts_leaves_the_event_loop_alone(
    colour: Colour,
    sampler: SamplingClient,
    session: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    script: Script,
) -> None:
    rendered: list[str] = []
    render = ChatTemplate.render

    def noted(self: ChatTemplate, *args: Any) -> str:
        rendered.append(threading.current_thread().name)
        return render(self, *args)

    monkeypatch.setattr(ChatTemplate, "render", noted)
    tokenizer, long = Watched(SMOLLM2), "x" * 9_000
    field = {"completions": "prompt", "responses": "input"}.get(path, "messages")
    async with colour.gateway(sampler, tokenizer=tokenizer) as gateway:
        http = Http(gateway.rollout(), session)
        for stream in (False, True):
            script.texts = [f"reply {long}"]
            prompt = f"{stream} {long}"
            asked: Any = prompt if field == "prompt" else [{"role": "user", "content": prompt}]
            async with http.send("POST", path, {"model": "m", field: asked, "stream": stream}) as answer:
                assert answer.status == 200, await answer.text()
    with_long = [name for size, name in tokenizer.work if size >= 9_000]
    assert with_long == ["AnyIO worker thread"] * 4  # each prompt is encoded, and each reply decoded
    assert rendered == ["AnyIO worker thread"] * (0 if path == "completions" else 2)


async def test_agents_in_every_worker_thread_do_not_hold_up_the_gateway(http: Http, gateway: AgentGateway) -> None:
    """They wait for an answer that needs a thread, too."""
    body = msgspec.json.encode({**CHAT, "messages": [{"role": "user", "content": "x" * 10_000}], "max_tokens": 1})
    headers = {"authorization": f"Bearer {http.rollout.api_key}"}
    url = f"{http.rollout.base_url}/chat/completions"

    def agent() -> int:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=PATIENCE_SECONDS) as answer:
            return int(answer.status)

    everyone = int(to_thread.current_default_thread_limiter().total_tokens)
    answers = await asyncio.gather(*(to_thread.run_sync(agent) for _ in range(everyone)))
    assert answers == [200] * everyone


# --- clients ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OpenAI", "Anthropic"):
        monkeypatch.setitem(sys.modules, name.lower(), openai_stub.module(name))


@pytest.mark.usefixtures("packages")
async def test_a_ready_client_fits_the_form_and_is_closed_with_its_rollout(colour: Colour, http: Http) -> None:
    rollout = colour.own(http.rollout)
    made = rollout.openai_client()
    assert isinstance(made, openai_stub.OpenAI if colour.module is loops_sync else openai_stub.AsyncOpenAI)
    assert made is rollout.openai_client()
    assert made.http_client is not None
    assert made.http_client.options["trust_env"] is False  # no proxy
    await http.rollout.close()
    assert made.is_closed
    with pytest.raises(ClosedError, match="closed"):
        rollout.openai_client()


@pytest.mark.usefixtures("packages")
async def test_either_form_can_be_asked_for(colour: Colour, http: Http) -> None:
    rollout = colour.own(http.rollout)
    async_, blocking = rollout.openai_client(blocking=False), rollout.openai_client(blocking=True)
    assert (type(async_), type(blocking)) == (openai_stub.AsyncOpenAI, openai_stub.OpenAI)
    create = blocking.chat.completions.create
    answers = [
        await async_.chat.completions.create(model="any", messages=HI),
        await asyncio.to_thread(create, model="any", messages=HI),
    ]
    assert [call.id for call in http.rollout.calls] == [each.id for each in answers]


@pytest.mark.usefixtures("packages")
async def test_each_api_has_its_client(colour: Colour, http: Http) -> None:
    made = colour.own(http.rollout).anthropic_client()
    assert (f"{made.base_url}/v1", made.api_key) == (http.rollout.base_url, http.rollout.api_key)


async def test_a_package_that_is_missing_is_named(colour: Colour, http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match="pip install openai"):
        colour.own(http.rollout).openai_client()


# --- arguments and records -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("host", "0.0.0.0"),
        ("tool_parser", "xml"),
        ("tool_parser", object()),
        ("history", "all"),
        ("defaults", {"tokens": 1}),
        ("force", {"temperature": -1}),
        ("defaults", 1),
        ("port", -1),
        ("port", 65_536),
        ("max_context", 0),
        ("grace", -1),
        ("ignore", "logit_bias"),
        ("end_tokens", "<|im_end|>"),
        ("end_tokens", 3),
        ("chat_template", 3),
        ("template_kwargs", ["x"]),
        ("template_kwargs", {"messages": []}),
        ("force", {"stop": ""}),
        ("template_kwargs", {"x": object()}),
        ("stream_wait", "soon"),
    ],
)
async def test_wrong_arguments_are_named(colour: Colour, sampler: SamplingClient, option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        async with colour.gateway(sampler, **{option: value}):
            pass


@pytest.mark.parametrize(("option", "value"), [("affinity_key", ""), ("affinity_key", 3), ("max_calls", -1)])
async def test_wrong_arguments_of_a_rollout_are_named(gateway: AgentGateway, option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        gateway.rollout(**{option: value})


async def test_wrong_templates_and_end_tokens_are_named(colour: Colour, sampler: SamplingClient) -> None:
    for option, value in (("chat_template", "{% if %}"), ("end_tokens", ["<|unknown|>"])):
        with pytest.raises(ConfigError, match=option):
            async with colour.gateway(sampler, tokenizer=ByteTokenizer(SMOLLM2), **{option: value}):
                pass


async def test_the_record_can_be_stored_and_has_no_key(
    colour: Colour, http: Http, gateway: AgentGateway, script: Script
) -> None:
    script.texts = ["a"]
    await http.post("chat/completions", CHAT)
    [call] = http.rollout.calls
    stored = msgspec.json.encode([http.rollout.calls, http.rollout.trajectories()])
    assert msgspec.json.decode(stored)[0][0]["id"] == call.id
    assert http.rollout.api_key not in f"{stored!r}{http.rollout!r}{gateway!r}{call!r}"
    assert http.rollout.reward is None
    colour.own(http.rollout).reward = 0.5
    assert http.rollout.reward == 0.5
    env = http.rollout.env()
    assert env["OPENAI_BASE_URL"] == http.rollout.base_url == f"{env['ANTHROPIC_BASE_URL']}/v1"
    assert env["OPENAI_API_KEY"] == env["ANTHROPIC_API_KEY"] == http.rollout.api_key


async def test_hundreds_of_rollouts_at_once_are_kept_apart(
    gateway: AgentGateway, session: aiohttp.ClientSession
) -> None:
    async def converse(number: int) -> None:
        http = Http(gateway.rollout(), session)
        messages: list[dict[str, Any]] = [{"role": "user", "content": f"number {number}"}]
        for _ in range(2):
            answer = await http.post("chat/completions", {**CHAT, "messages": messages, "max_tokens": 8})
            messages = [*messages, answer["choices"][0]["message"], {"role": "user", "content": "more"}]
        assert [call.branch for call in http.rollout.calls] == ["new", None]
        await http.rollout.close()

    await asyncio.gather(*map(converse, range(200)))
