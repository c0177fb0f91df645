"""Conversations of real clients, which know nothing of this library; runs where one set of them is installed.

Reads JSON: ``{"judge": name, "rounds": [{"stream": bool, "tools": bool, "rollouts": [{"base_url": ..., "api_key": ...},
...]}, ...]}``. Each rollout has one conversation: a question, a tool call where there are tools, and one more question.
Those of a round are all at once; one round follows another in the same process, since to import a client takes
seconds. Writes JSON: for each round ``{"seconds": ..., "said": [...]}``, with what the model said last in each
conversation; or ``{"error": ...}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import redirect_stdout
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

Judge = Callable[[str, str, bool, bool], Awaitable[str]]

QUESTIONS = ("How warm is Rome?", "And tomorrow?")
TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
MOST_TOKENS = 24


def weather(city: str) -> str:
    return f"20 C in {city}"


async def openai_chat(base_url: str, api_key: str, stream: bool, tools: bool) -> str:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        return await _chat(client.chat.completions.create, stream, tools, model="judge")


async def openai_ready(base_url: str, api_key: str, stream: bool, tools: bool) -> str:
    """Converse with what `AgentRollout.openai_client` returns: the blocking client, or to stream the other one."""
    clients = _ready(base_url, api_key)
    client = clients.get("openai", blocking=not stream)

    async def blocking(**options: Any) -> Any:
        return await asyncio.to_thread(client.chat.completions.create, **options)

    said = await _chat(client.chat.completions.create if stream else blocking, stream, tools, model="judge")
    await clients.close()
    return said


def _ready(base_url: str, api_key: str) -> Any:
    """Return the library's own clients, from their file, since the library is not installed beside the others."""
    file = Path(__file__).parents[2] / "loops_async" / "_agents" / "clients.py"
    spec: Any = spec_from_file_location("ready", file)
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Clients({"openai": base_url, "anthropic": base_url.removesuffix("/v1")}, api_key)


async def litellm(base_url: str, api_key: str, stream: bool, tools: bool) -> str:
    import litellm as library

    create: Any = library.acompletion
    return await _chat(create, stream, tools, model="openai/judge", api_base=base_url, api_key=api_key)


async def _chat(create: Any, stream: bool, tools: bool, **options: Any) -> str:
    """Converse through an interface like that of chat completions."""
    if tools:
        options["tools"] = [{"type": "function", "function": TOOL}]
    messages: list[Any] = []
    said = ""
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        while True:
            answer = await create(messages=messages, max_tokens=MOST_TOKENS, stream=stream, **options)
            message = await _joined(answer) if stream else answer.choices[0].message.model_dump(exclude_none=True)
            messages.append(message)
            said = message.get("content") or ""
            calls = message.get("tool_calls") or []
            if not calls:
                break
            for call in calls:
                result = weather(**json.loads(call["function"]["arguments"]))
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    return said


async def _joined(chunks: AsyncIterator[Any]) -> dict[str, Any]:
    """Put the deltas of a stream together, as every agent does."""
    content = ""
    calls: dict[int, dict[str, Any]] = {}
    async for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for part in choice.delta.tool_calls or ():
                call = calls.setdefault(
                    part.index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
                )
                call["id"] += part.id or ""
                call["function"]["name"] += part.function.name or ""
                call["function"]["arguments"] += part.function.arguments or ""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    return {**message, "tool_calls": [calls[index] for index in sorted(calls)]} if calls else message


async def openai_responses(base_url: str, api_key: str, stream: bool, tools: bool) -> str:
    from openai import AsyncOpenAI

    options: dict[str, Any] = {"tools": [{"type": "function", **TOOL}]} if tools else {}
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        items: list[Any] = []
        response: Any = None
        for question in QUESTIONS:
            items.append({"role": "user", "content": question})
            while True:
                asked = {"model": "judge", "input": items, "max_output_tokens": MOST_TOKENS, **options}
                if stream:
                    async with client.responses.stream(**asked) as events:
                        async for _ in events:
                            pass
                        response = await events.get_final_response()
                else:
                    response = await client.responses.create(**asked)
                items += [item.model_dump(exclude_none=True) for item in response.output]
                calls = [item for item in response.output if item.type == "function_call"]
                if not calls:
                    break
                for call in calls:
                    output = weather(**json.loads(call.arguments))
                    items.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
        return str(response.output_text)


async def anthropic(base_url: str, api_key: str, stream: bool, tools: bool) -> str:
    from anthropic import AsyncAnthropic

    async with AsyncAnthropic(base_url=base_url.removesuffix("/v1"), api_key=api_key) as client:
        return await _anthropic(client, stream, tools)


async def anthropic_ready(base_url: str, api_key: str, stream: bool, tools: bool) -> str:
    async with _ready(base_url, api_key).get("anthropic", blocking=False) as client:
        return await _anthropic(client, stream, tools)


async def _anthropic(client: Any, stream: bool, tools: bool) -> str:
    tool = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}
    options: dict[str, Any] = {"tools": [tool]} if tools else {}
    messages: list[Any] = []
    answer: Any = None
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        while True:
            asked = {"model": "judge", "max_tokens": MOST_TOKENS, "messages": messages, **options}
            if stream:
                async with client.messages.stream(**asked) as events:
                    answer = await events.get_final_message()
            else:
                answer = await client.messages.create(**asked)
            messages.append({"role": "assistant", "content": [each.model_dump() for each in answer.content]})
            calls = [block for block in answer.content if block.type == "tool_use"]
            if not calls:
                break
            results = [
                {"type": "tool_result", "tool_use_id": call.id, "content": weather(**call.input)} for call in calls
            ]
            messages.append({"role": "user", "content": results})
    return "".join(block.text for block in answer.content if block.type == "text")


async def agents_chat(base_url: str, api_key: str, stream: bool, tools: bool) -> str:
    from agents import OpenAIChatCompletionsModel

    return await _agents(OpenAIChatCompletionsModel, base_url, api_key, stream, tools)


async def agents_responses(base_url: str, api_key: str, stream: bool, tools: bool) -> str:
    from agents import OpenAIResponsesModel

    return await _agents(OpenAIResponsesModel, base_url, api_key, stream, tools)


async def _agents(kind: Any, base_url: str, api_key: str, stream: bool, tools: bool) -> str:
    from agents import Agent, ModelSettings, Runner, function_tool, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        agent = Agent(
            name="judge",
            instructions="Be short.",
            model=kind(model="judge", openai_client=client),
            model_settings=ModelSettings(max_tokens=MOST_TOKENS),
            tools=[function_tool(weather)] if tools else [],
        )
        items: list[Any] = []
        result: Any = None
        for question in QUESTIONS:
            items.append({"role": "user", "content": question})
            if stream:
                result = Runner.run_streamed(agent, items)
                async for _ in result.stream_events():
                    pass
            else:
                result = await Runner.run(agent, items)
            items = result.to_input_list()
        return str(result.final_output)


async def verifiers(base_url: str, api_key: str, stream: bool, tools: bool) -> str:
    """Evaluate an environment of one question; it has no streams."""
    import verifiers as vf
    from datasets import Dataset
    from openai import AsyncOpenAI

    questions = Dataset.from_list([{"question": QUESTIONS[0], "answer": "warm"}])
    rubric = vf.Rubric(funcs=[lambda completion, **_: float(len(completion))])
    kind: Any = vf.ToolEnv if tools else vf.SingleTurnEnv
    options: dict[str, Any] = {"tools": [weather], "max_turns": 4} if tools else {}
    environment = kind(dataset=questions, rubric=rubric, **options)
    client = vf.OpenAIChatCompletionsClient(AsyncOpenAI(base_url=base_url, api_key=api_key))
    result: Any = await environment.evaluate(
        client=client, model="judge", sampling_args={"max_tokens": MOST_TOKENS}, num_examples=1
    )
    return str(result["outputs"][0]["completion"][-1]["content"] or "")


JUDGES: dict[str, Judge] = {
    "openai_chat": openai_chat,
    "openai_ready": openai_ready,
    "openai_responses": openai_responses,
    "litellm": litellm,
    "verifiers": verifiers,
    "anthropic": anthropic,
    "anthropic_ready": anthropic_ready,
    "agents_chat": agents_chat,
    "agents_responses": agents_responses,
}


async def main() -> None:
    asked = json.load(sys.stdin)
    judge = JUDGES[asked["judge"]]
    with redirect_stdout(sys.stderr):  # some of them print
        rounds = [await _round(judge, each) for each in asked["rounds"]]
    json.dump(rounds, sys.stdout)


async def _round(judge: Judge, asked: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    conversations = (
        judge(each["base_url"], each["api_key"], asked["stream"], asked["tools"]) for each in asked["rollouts"]
    )
    try:
        said = await asyncio.gather(*conversations)
    except Exception:
        return {"error": traceback.format_exc()}
    return {"seconds": time.monotonic() - began, "said": said}


if __name__ == "__main__":
    asyncio.run(main())
