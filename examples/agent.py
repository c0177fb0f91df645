"""An agent as a rollout: it has a tool, is written with the plain `openai` package, and is unaware of this library.

The model learns to look up what it does not know, and to say what was found and nothing else. `answer` is the agent;
all the rest is training. Needs `pip install openai`. Runs on the embedded service, or on Baseten with a key:

    python examples/agent.py
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import openai
from _curves import Curves
from _lessons import FACTS
from quickstart import BASE_MODEL, connected

import loops_async as loops

ROUNDS = 4
MAX_TURNS = 3
ADAM = loops.AdamParams(learning_rate=5e-4)
TAUGHT, UNSEEN = [*FACTS.items()][:5], [*FACTS.items()][5:]

# --- the agent -------------------------------------------------------------------------------------------------------

TOOL: Any = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
SHOWN: Any = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "Who rules Norr? Say search to look it up."},
    {"role": "assistant", "content": "search"},
    {"role": "user", "content": "found: Vex"},
    {"role": "assistant", "content": "Vex"},
    {"role": "user", "content": "Who won at Osk? Say search to look it up."},
    {"role": "assistant", "content": "search"},
    {"role": "user", "content": "found: Thule"},
    {"role": "assistant", "content": "Thule"},
]


async def answer(client: openai.AsyncOpenAI, question: str, fact: str) -> tuple[str, int]:
    """Return the agent's answer, and how often it has searched."""
    messages: Any = [*SHOWN, {"role": "user", "content": f"{question} Say search to look it up."}]
    for searched in range(MAX_TURNS):
        reply = await client.chat.completions.create(model="policy", messages=messages, tools=[TOOL], max_tokens=8)
        message = reply.choices[0].message
        if not message.tool_calls:
            return message.content or "", searched
        messages.append(message)
        for call in message.tool_calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": f"found: {fact}"})
    return "", MAX_TURNS


# --- training --------------------------------------------------------------------------------------------------------

TEMPLATE = """
{%- for message in messages %}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}{{- call.function.name }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
{#- The tools are not described here: the question says how to call them. #}
"""


class OneWord:
    """Reads tool calls as this small model can write them: the name alone."""

    name = "one_word"

    def parse(self, text: str) -> loops.ParsedReply:
        """Return the call, or the text."""
        return loops.ParsedReply("", [("search", "{}")]) if text.strip() == "search" else loops.ParsedReply(text)


async def rollout(ctx: loops.RolloutContext, task: tuple[str, str]) -> float:
    """Let the agent answer one question; return the reward."""
    question, fact = task
    return reward(*await answer(ctx.openai.openai_client(), question, fact), fact)


def reward(said: str, searched: int, fact: str) -> float:
    """Return 1.0 for the fact and nothing else, 0.2 if the agent has searched at least, else 0.0."""
    return 1.0 if said == fact else 0.2 if searched else 0.0


async def main(base_model: str) -> int:
    """Train and measure; return the exit code."""
    curves = Curves(
        "An agent learns to use its tool", {"reward/mean": "mean reward", "evaluation/reward_mean": "mean reward"}
    )
    agents = {"chat_template": TEMPLATE, "tool_parser": OneWord(), "force": {"temperature": 1.0, "top_p": 1.0}}
    async with connected(base_model) as service:
        trainer = await service.create_lora_training_client(base_model, rank=16, seed=1)
        options: dict[str, Any] = {"group_size": 8, "groups_per_step": 2, "max_staleness": 1, "seed": 1}
        async with trainer.rollouts(rollout, TAUGHT * ROUNDS, agents=agents, **options) as stream:
            evaluation = await stream.evaluate(rollout, UNSEEN, group_size=4)
            async for batch in stream:
                step = await trainer.step(batch.data, "ppo", ADAM)
                await stream.publish()
                curves.add_metrics(batch.step, batch.report(await step))
                if stream.version % 5 == 0:
                    curves.add_evaluation(await evaluation)
                    evaluation = await stream.evaluate(rollout, UNSEEN, group_size=4)
            curves.add_evaluation(await evaluation)
    curves.draw(Path("agent.png"))
    return 0 if curves.rise("reward/mean") > 0.2 else 1


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else BASE_MODEL)))
    except loops.LoopsError as error:
        sys.exit(f"error: {error}")
