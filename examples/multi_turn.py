"""Asynchronous RL over several turns: the model learns to look up what it does not know, and to repeat what was found.

An episode is a chat with a library. If the model answers "yes" to the question whether to look it up, the library
replies, and the model answers again. Evaluated on facts that training never asks for. The loop is that of
`async_rl.py`: only the rollout differs. Runs on the embedded service, or on Baseten with a key:

    python examples/multi_turn.py
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from _lessons import FACTS, chat, user_turn
from async_rl import learn
from quickstart import BASE_MODEL

import loops_async as loops

ROUNDS = 16
MAX_TURNS = 3
EXAMPLE = ("Who rules Norr? Answer yes to look it up.", "yes", "found: Vex", "Vex")

TAUGHT, UNSEEN = [*FACTS.items()][:5], [*FACTS.items()][5:]


def library(fact: str, said: str) -> str | None:
    """Reply to what the model has said, as the environment does; None ends the episode."""
    return f"found: {fact}" if said == "yes" else None


def reward(fact: str, said: str, turns: int) -> float:
    """Return 1.0 if the model has said the fact and nothing else, 0.2 if it has looked it up, else 0.0."""
    return 1.0 if said == fact else 0.2 if turns > 1 else 0.0


def looking_up(tokenizer: Any) -> loops.Rollout:
    """Return the rollout: a question, and a chat with the library about it."""

    async def rollout(ctx: loops.RolloutContext, task: tuple[str, str]) -> loops.Episode:
        question, fact = task
        episode = loops.Episode.start(chat(tokenizer, *EXAMPLE, f"{question} Answer yes to look it up."))
        while True:
            answer = await ctx.sample(episode, loops.SamplingParams(max_tokens=8))
            said = tokenizer.decode(answer.tokens, skip_special_tokens=True)
            reply = await ctx.run(library, fact, said)  # in a worker thread, so it could search a disk or a network
            if reply is None or episode.turns == MAX_TURNS:
                episode.reward = reward(fact, said, episode.turns)
                return episode
            episode.observe(user_turn(tokenizer, reply, after=episode.tokens))

    return rollout


async def main(base_model: str) -> int:
    """Train and measure; return the exit code."""
    title = "Asynchronous RL over several turns: looking up what is not known"
    return await learn(base_model, looking_up, TAUGHT * ROUNDS, UNSEEN, work=Path("multi_turn"), title=title)


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else BASE_MODEL)))
    except loops.LoopsError as error:
        sys.exit(f"error: {error}")
