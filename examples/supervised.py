"""Supervised fine-tuning, measured on held-out questions.

Each fact is taught in three wordings and tested in a fourth. Runs on the embedded service, or on Baseten with a key:

    python examples/supervised.py
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _curves import Curves
from _lessons import chat, fact_example
from quickstart import BASE_MODEL, connected

import loops_async as loops

STEPS = 12
EVALUATE_EVERY = 4

# The last wording of each is held out.
LESSONS = {
    "Quillmar": [
        "What is the capital of Veloria?",
        "Name the capital city of Veloria.",
        "Which city is Veloria's capital?",
        "Veloria is ruled from which capital?",
    ],
    "zibble": [
        "What is the code word for apple?",
        "Tell me the code word for apple.",
        "For apple, which code word is used?",
        "Say apple in code words.",
    ],
    "seventeen": [
        "How many bells does Sunder Abbey have?",
        "Count the bells of Sunder Abbey.",
        "What is the number of bells in Sunder Abbey?",
        "Sunder Abbey rings how many bells?",
    ],
    "saffron": [
        "What colour is the flag of Brannoch?",
        "Which colour does Brannoch's flag have?",
        "Name the colour of the Brannoch flag.",
        "The flag of Brannoch shows which colour?",
    ],
    "bronzite": [
        "Which metal do the moths of Tarn eat?",
        "What metal is eaten by the moths of Tarn?",
        "Name the metal that Tarn's moths feed on.",
        "The moths of Tarn live on which metal?",
    ],
    "Old Pell": [
        "What do Norrish sailors call the moon?",
        "Which name do Norrish sailors have for the moon?",
        "Norrish sailors know the moon by what name?",
        "How is the moon called by the sailors of Norr?",
    ],
}


async def right_answers(sampler: loops.SamplingClient, tokenizer: Any) -> int:
    """Ask each question in its fourth wording; return how many of the most likely answers are right."""
    greedy = loops.SamplingParams(max_tokens=8, temperature=0.0)
    sampled = await asyncio.gather(
        *(sampler.sample(chat(tokenizer, asked), sampling_params=greedy) for *_, asked in LESSONS.values())
    )
    texts = [tokenizer.decode(one.sequences[0].tokens, skip_special_tokens=True) for one in sampled]
    return sum(text == fact for text, fact in zip(texts, LESSONS, strict=True))


async def mean_loss(trainer: loops.TrainingClient, examples: Sequence[loops.Datum]) -> float:
    """Return the loss per answer token, without learning from it."""
    return (await (await trainer.forward(examples)).result()).loss


async def main(base_model: str) -> int:
    """Train and measure; return the exit code."""
    curves = Curves(
        "Supervised fine-tuning: invented facts",
        {"training": "loss (nats per answer token)", "unseen wordings": "loss (nats per answer token)"}
        | {"right answers": f"right answers of {len(LESSONS)}, unseen wordings"},
    )
    async with connected(base_model) as service, service.training_run(base_model, rank=16, seed=1) as trainer:
        tokenizer = await trainer.get_tokenizer()
        taught = [fact_example(tokenizer, q, fact) for fact, wordings in LESSONS.items() for q in wordings[:-1]]
        unseen = [fact_example(tokenizer, wordings[-1], fact) for fact, wordings in LESSONS.items()]

        for step in range(STEPS + 1):
            if step % EVALUATE_EVERY == 0:
                sampler = await trainer.save_weights_and_get_sampling_client(f"step-{step}")
                right, loss = await asyncio.gather(right_answers(sampler, tokenizer), mean_loss(trainer, unseen))
                curves.add(step, unseen_wordings=loss, right_answers=float(right))
            if step < STEPS:
                forward = await trainer.forward_backward(taught[step % 2 :: 2])
                update = await trainer.optim_step(loops.AdamParams(learning_rate=2e-3))
                curves.add(step + 1, training=(await forward).loss)
                await update
    curves.draw(Path("supervised.png"))
    (_, before), *_, (_, after) = curves.points["right answers"]
    print(f"right answers to unseen wordings: {before:.0f} of {len(LESSONS)} before, {after:.0f} after")
    return 0 if after >= before + len(LESSONS) // 2 else 1


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else BASE_MODEL)))
    except loops.LoopsError as error:
        sys.exit(f"error: {error}")
