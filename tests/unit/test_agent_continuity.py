"""What a call of an agent continues: token for token, or not at all."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loops_async import InputError
from loops_async._agents.trajectories import trajectories_of
from loops_async.agents import AgentCall, Trajectory
from tests.support.agents import TIME, WEATHER, Agent
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.templates import FAMILIES

TEXTS = st.text("ab <|im_end|>\n é", max_size=12)


def user(text: str = "hi") -> dict[str, Any]:
    return {"role": "user", "content": text}


def hermes(name: str = "weather", **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


WRITTEN = {
    "llama31": '{"name": "weather", "parameters": {"city": "Rome"}}',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]',
}
"""A tool call as each family writes it; the others write it as Hermes does."""


def agent_of(family: str, **options: Any) -> Agent:
    template, end = FAMILIES[family]
    return Agent(ByteTokenizer(template, eos=end), **options)


# --- any conversation ------------------------------------------------------------------------------------------------


@st.composite
def replies(draw: st.DrawFn, family: str) -> tuple[str, str]:
    """What a model writes, and with which token it ends: its own, another one, or none since it was cut."""
    thought = draw(st.sampled_from(["", "<think>\nhm\n</think>\n\n", "so\n</think>\n\n"]))
    call = draw(st.sampled_from(["", "", WRITTEN.get(family, hermes(city="Rome")), "<tool_call>\n{broken"]))
    text = "" if family in WRITTEN and call else draw(TEXTS)
    return thought + text + call, draw(st.sampled_from([FAMILIES[family][1]] * 3 + ["", "<|endoftext|>"]))


def matches(request: list[dict[str, Any]], call: AgentCall) -> bool:
    """Whether a request begins with the messages of a call and its reply, as an agent would compare them."""
    whole = [*(call.messages or []), call.reply or {}]
    return len(request) >= len(whole) and all(same(*pair) for pair in zip(request, whole, strict=False))


def same(sent: dict[str, Any], kept: dict[str, Any]) -> bool:
    thought = sent.get("reasoning_content")
    return plain(sent) == plain(kept) and thought in (None, kept.get("reasoning_content"))


def plain(message: dict[str, Any]) -> tuple[Any, ...]:
    calls = [(each["function"]["name"], each["function"]["arguments"]) for each in message.get("tool_calls") or []]
    return message["role"], message.get("content") or "", [(name, json.loads(text)) for name, text in calls]


def tail_of(reply: dict[str, Any], text: str) -> list[dict[str, Any]]:
    """What an agent sends after a reply: the results of its calls, or else the next question."""
    results = [{"role": "tool", "tool_call_id": c["id"], "content": text} for c in reply.get("tool_calls") or []]
    return results or [user(text)]


def check_prompt(agent: Agent, call: AgentCall, before: list[AgentCall], request: list[dict[str, Any]]) -> None:
    """The property of the contract."""
    candidates = [each for each in before if matches(request, each) and each.tools == call.tools]
    if not candidates:
        assert call.branch in ("new", "edited", "tools")
        assert call.prompt_tokens == agent.rendered(call)
        return
    longest = max(candidates, key=lambda each: (len(each.messages or []), before.index(each)))
    assert call.parent_id == longest.id
    if call.branch is None:
        sampled = longest.prompt_tokens + longest.tokens
        assert call.prompt_tokens[: len(sampled)] == sampled
        assert len(call.prompt_tokens) > len(sampled)
    else:
        assert call.branch == "template"
        assert call.prompt_tokens == agent.rendered(call)


def check_trajectories(calls: list[AgentCall], trajectories: list[Trajectory], *, merge: bool) -> None:
    """Every sampled token is trained once, behind what it was sampled behind."""
    trained = [id_ for each in trajectories for id_, on in zip(each.call_ids, each.mask, strict=True) if on]
    assert sorted(trained) == sorted(call.id for call in calls for _ in call.tokens)
    by_id = {call.id: call for call in calls}
    for each in trajectories:
        assert len(each.tokens) == len(each.mask) == len(each.logprobs) == len(each.policy_versions)
        assert each.calls == [by_id[call.id] for call in each.calls]
        for id_ in dict.fromkeys(filter(None, each.call_ids)):
            call, at = by_id[id_], each.call_ids.index(id_)
            end = at + len(call.tokens)
            assert each.tokens[:at] == call.prompt_tokens
            assert each.tokens[at:end] == call.tokens
            assert each.logprobs[at:end] == call.logprobs
            assert each.policy_versions[at:end] == [call.policy_version] * len(call.tokens)
    assert merge or len(trajectories) == len(calls)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_prompt_continues_a_call_or_is_rendered_anew(family: str, data: st.DataObject) -> None:
    async def converse() -> None:
        agent = agent_of(family)
        conversations: list[list[dict[str, Any]]] = [[user()]]
        for _ in range(data.draw(st.integers(2, 6))):
            messages = [dict(each) for each in data.draw(st.sampled_from([*conversations, *conversations[-1:] * 4]))]
            change = data.draw(st.sampled_from(["none"] * 4 + ["edit", "forget", "drop tools"]))
            if change == "edit":
                at = data.draw(st.integers(0, len(messages) - 1))
                messages[at]["content"] = (messages[at].get("content") or "") + "!"
            elif change == "forget":  # many frameworks do not send the reasoning back
                messages = [{k: v for k, v in each.items() if k != "reasoning_content"} for each in messages]
            tools = [] if change == "drop tools" or family == "gemma2" else [WEATHER]
            text, end = data.draw(replies(family))
            before = agent.calls
            reply = await agent.reply(text, end, messages=messages, tools=tools)
            check_prompt(agent, agent.calls[-1], before, messages)
            conversations.append([*messages, reply, *tail_of(reply, data.draw(TEXTS))])
        for merge in (True, False):
            check_trajectories(
                agent.calls, trajectories_of(agent.recorder.calls, merge=merge, select=None), merge=merge
            )

    asyncio.run(converse())


@settings(max_examples=20, deadline=None)
@given(data=st.data(), family=st.sampled_from(sorted(FAMILIES)), adds_space=st.booleans(), thinks=st.booleans())
def test_with_keep_a_conversation_is_one_sequence(
    data: st.DataObject, family: str, adds_space: bool, thinks: bool
) -> None:
    async def converse() -> None:
        template, end = FAMILIES[family]
        agent = Agent(ByteTokenizer(template, eos=end, adds_space=adds_space), history="keep")
        messages = [user()]
        for _ in range(4):
            text = ("<think>\nhm\n</think>\n\n" if thinks else "") + data.draw(TEXTS)
            reply = await agent.reply(text, data.draw(st.sampled_from([end, ""])), messages=messages)
            messages = [*messages, reply, user(data.draw(TEXTS))]
        assert [call.branch for call in agent.calls] == ["new", None, None, None]
        [trajectory] = trajectories_of(agent.recorder.calls, merge=True, select=None)
        check_trajectories(agent.calls, [trajectory], merge=True)

    asyncio.run(converse())


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXTS, min_size=2, max_size=5), tools=st.booleans())
def test_what_follows_a_reply_is_what_the_template_writes(texts: list[str], tools: bool) -> None:
    """Where a template changes no text, the tokens of a continued prompt are those of the whole conversation."""

    async def converse() -> None:
        agent = agent_of("smollm2")
        messages = [user()]
        for text in texts:
            said = hermes(city=text) if tools else text.replace("<|im_end|>", "")
            reply = await agent.reply(said, "<|im_end|>", messages=messages, tools=[WEATHER] if tools else [])
            messages = [*messages, reply, *tail_of(reply, text)]
        for call in agent.calls[1:]:
            assert call.branch is None
            assert agent.tokenizer.decode(call.prompt_tokens) == agent.tokenizer.decode(agent.rendered(call))

    asyncio.run(converse())


# --- what each family does -------------------------------------------------------------------------------------------


async def branches(agent: Agent, *texts: str, tools: bool = False, **body: Any) -> list[str | None]:
    """Let an agent converse, answering each tool call; return the branch of each call."""
    messages = [user()]
    for text in texts:
        options = {"tools": [WEATHER]} if tools else {}
        reply = await agent.reply(text, agent.tokenizer.eos_token, messages=messages, **options, **body)
        messages = [*messages, reply, *tail_of(reply, "sunny")]
    return [call.branch for call in agent.calls]


THOUGHT = "<think>\nhm\n</think>\n\n"


async def test_qwen3_continues_within_a_tool_loop_and_branches_at_the_next_question() -> None:
    texts = (THOUGHT + hermes(city="Rome"), THOUGHT + "sunny", "fine")
    assert await branches(agent_of("qwen3"), *texts, tools=True) == ["new", None, "template"]
    assert await branches(agent_of("qwen3", history="keep"), *texts, tools=True) == ["new", None, None]


async def test_qwen3_without_thinking_continues_only_where_the_template_writes_the_same() -> None:
    assert await branches(agent_of("qwen3"), "a", "b") == ["new", None]
    quiet = agent_of("qwen3", variables={"enable_thinking": False})
    assert await branches(quiet, "a", "b") == ["new", "template"]


@pytest.mark.parametrize("family", ["llama31", "gemma2", "smollm2"])
async def test_plain_templates_continue(family: str) -> None:
    assert await branches(agent_of(family), "a", "b", "c") == ["new", None, None]


async def test_llama_continues_with_tools() -> None:
    assert await branches(agent_of("llama31"), WRITTEN["llama31"], "b", "c", tools=True) == ["new", None, None]


async def test_mistral_moves_its_tools_and_so_branches_at_the_next_question() -> None:
    assert await branches(agent_of("mistral"), WRITTEN["mistral"], "b", "c", tools=True) == ["new", None, "template"]
    kept = agent_of("mistral", history="keep")
    assert await branches(kept, WRITTEN["mistral"], "b", "c", tools=True) == ["new", None, None]


async def test_deepseek_drops_what_its_prompt_opened() -> None:
    agent = agent_of("deepseek_r1")
    assert await branches(agent, "so\n</think>\n\nyes", "b") == ["new", "template"]
    assert (agent.calls[0].reply or {})["reasoning_content"] == "so"


async def test_a_turn_that_ends_with_the_next_role_is_closed_by_it() -> None:
    """A GLM model stops at the token of who speaks next."""
    agent = agent_of("glm45")
    reply = await agent.reply(THOUGHT + hermes(city="Rome"), "<|observation|>", messages=[user()], tools=[WEATHER])
    await agent.reply("ok", "<|user|>", messages=[user(), reply, *tail_of(reply, "sunny")], tools=[WEATHER])
    first, second = agent.calls
    rest = agent.tokenizer.decode(second.prompt_tokens[len(first.prompt_tokens + first.tokens) :])
    assert (second.branch, rest) == (None, "\n<tool_response>\nsunny\n</tool_response><|assistant|>")


async def test_a_cut_reply_is_closed_without_being_trained() -> None:
    agent = agent_of("smollm2")
    reply = await agent.reply("half a sen", "", messages=[user()])
    await agent.reply("b", "<|im_end|>", messages=[user(), reply, user("go on")])
    first, second = agent.calls
    rest = second.prompt_tokens[len(first.prompt_tokens + first.tokens) :]
    assert agent.tokenizer.decode(rest).startswith("<|im_end|>\n<|im_start|>user\ngo on")
    [trajectory] = trajectories_of(agent.recorder.calls, merge=True, select=None)
    assert not any(trajectory.mask[len(first.prompt_tokens + first.tokens) : len(second.prompt_tokens)])


async def test_text_of_the_model_is_never_taken_for_the_end_of_its_turn() -> None:
    agent = agent_of("smollm2")
    said = [*b"a <|im_end|> b", *agent.tokenizer.encode("<|im_end|>", add_special_tokens=False)]
    reply = await agent.reply(said, "", messages=[user()])
    assert reply["content"] == "a <|im_end|> b"
    await agent.reply("c", "<|im_end|>", messages=[user(), reply, user("more")])
    first, second = agent.calls
    rest = second.prompt_tokens[len(first.prompt_tokens + first.tokens) :]
    assert agent.tokenizer.decode(rest) == "\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"


async def test_other_tools_are_another_branch() -> None:
    agent = agent_of("smollm2")
    reply = await agent.reply("a", "<|im_end|>", messages=[user()], tools=[WEATHER])
    messages = [user(), reply, user("more")]
    await agent.reply("b", "<|im_end|>", messages=messages, tools=[TIME])
    await agent.reply("c", "<|im_end|>", messages=messages, tools=[WEATHER])
    first, second, third = agent.calls
    assert (second.branch, second.parent_id) == ("tools", first.id)
    assert (third.branch, third.parent_id) == (None, first.id)


async def test_ids_of_calls_and_the_order_of_arguments_make_no_difference() -> None:
    agent = agent_of("qwen3")
    reply = await agent.reply(hermes(city="Rome", day=1.0), "<|im_end|>", messages=[user()], tools=[WEATHER])
    [call] = reply["tool_calls"]
    call |= {"id": "other", "function": {"name": "weather", "arguments": '{"day":1, "city":"Rome"}'}}  # as JavaScript
    await agent.reply("b", "<|im_end|>", messages=[user(), reply, *tail_of(reply, "sunny")], tools=[WEATHER])
    assert agent.calls[1].branch is None


async def test_other_reasoning_is_an_edit() -> None:
    agent = agent_of("qwen3")
    reply = await agent.reply(THOUGHT + hermes(city="Rome"), "<|im_end|>", messages=[user()], tools=[WEATHER])
    changed = {**reply, "reasoning_content": "I was told so"}
    await agent.reply("b", "<|im_end|>", messages=[user(), changed, *tail_of(reply, "sunny")], tools=[WEATHER])
    assert agent.calls[1].branch == "edited"


async def test_rollback_and_repeat_make_a_tree() -> None:
    agent = agent_of("smollm2")
    first = await agent.reply("a", "<|im_end|>", messages=[user()])
    for text in ("b", "c"):
        await agent.reply(text, "<|im_end|>", messages=[user(), first, user("more")])
    calls = agent.calls
    assert [call.parent_id for call in calls] == [None, calls[0].id, calls[0].id]
    one, other = trajectories_of(agent.recorder.calls, merge=True, select=None)
    assert [each.id for each in other.calls] == [calls[0].id, calls[2].id]
    assert one.mask.count(True) == len(calls[0].tokens + calls[1].tokens)
    assert other.mask.count(True) == len(calls[2].tokens)
    assert other.tokens[: len(calls[2].prompt_tokens)] == calls[2].prompt_tokens


async def test_what_is_not_selected_is_context_only() -> None:
    agent = agent_of("smollm2")
    reply = await agent.reply("a", "<|im_end|>", messages=[user()], model="titles")
    await agent.reply("b", "<|im_end|>", messages=[user(), reply, user()], model="main")
    second = agent.calls[1]
    [trajectory] = trajectories_of(agent.recorder.calls, merge=True, select=lambda call: call.model == "main")
    assert trajectory.tokens == second.prompt_tokens + second.tokens
    assert trajectory.mask.count(True) == len(second.tokens)


async def test_each_call_has_an_advantage() -> None:
    agent = agent_of("smollm2")
    await agent.reply("a", "<|im_end|>", messages=[user()])
    [call] = agent.calls
    [trajectory] = trajectories_of(agent.recorder.calls, merge=True, select=None)
    for advantage in (2.0, {call.id: 2.0}, {call.id: 2.0}.__getitem__):
        datum = trajectory.to_datum(advantage)
        assert set(datum.loss_fn_inputs["advantages"].data) == {0.0, 2.0}
    for wrong in ({}, {call.id: math.nan}, math.inf, lambda _: "high"):
        with pytest.raises(InputError, match="advantage"):
            trajectory.to_datum(wrong)  # type: ignore[arg-type]  # what users may pass
    with pytest.raises(InputError, match="two tokens"):
        Trajectory(tokens=[1], mask=[False], logprobs=[0.0]).to_datum()


async def test_memory_is_linear_in_what_is_added() -> None:
    agent = agent_of("smollm2")
    messages = [user("x" * 1000)]
    for _ in range(20):
        messages = [*messages, await agent.reply("a", "<|im_end|>", messages=messages), user()]
    kept = sum(len(call.prompt.rest) + len(call.tokens) for call in agent.recorder.calls)
    assert kept == len(agent.calls[-1].prompt_tokens) + len(agent.calls[-1].tokens)
    assert sum(len(call.prompt.added) for call in agent.recorder.calls) == 20


async def test_a_branch_keeps_the_tokens_in_common_once() -> None:
    agent = agent_of("qwen3")
    messages = [user("x" * 1000)]
    for _ in range(3):
        messages = [*messages, await agent.reply(THOUGHT + "a", "<|im_end|>", messages=messages), user()]
    assert [call.branch for call in agent.calls] == ["new", "template", "template"]
    assert sum(len(call.prompt.rest) for call in agent.recorder.calls) < 1500
    assert [call.prompt_tokens for call in agent.calls] == [agent.rendered(call) for call in agent.calls]
