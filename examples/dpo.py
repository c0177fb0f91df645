"""Direct preference optimization: the model learns to prefer one word to its own longer answer.

It is measured on held-out questions: how long the model's own answers to them are, and whether it prefers the chosen
answers. Runs on the embedded service, or on Baseten with a key:

    python examples/dpo.py
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _curves import Curves
from _lessons import chat
from quickstart import BASE_MODEL, connected

import loops_async as loops

STEPS = 6
EVALUATE_EVERY = 3
SETTINGS = {"beta": 0.1}
GREEDY = loops.SamplingParams(max_tokens=24, temperature=0.0)

TAUGHT = {
    "What is the capital of France?": "Paris",
    "Which planet is the largest?": "Jupiter",
    "Who wrote Hamlet?": "Shakespeare",
    "What colour is grass?": "Green",
    "How many legs has a spider?": "Eight",
    "Which metal is liquid at room temperature?": "Mercury",
    "What do bees make?": "Honey",
    "On which continent is Egypt?": "Africa",
}
HELD_OUT = {
    "What is the capital of Italy?": "Rome",
    "Which animal gives milk?": "Cow",
    "What colour is the sky?": "Blue",
    "How many wheels has a bicycle?": "Two",
}


async def pairs(reference: loops.SamplingClient, tokenizer: Any, questions: Mapping[str, str]) -> list[loops.Datum]:
    """Return for each question the chosen word and the reference's own answer, both with the reference's logprobs."""
    prompts = [chat(tokenizer, question) for question in questions]
    sampled = await asyncio.gather(*(reference.sample(prompt, sampling_params=GREEDY) for prompt in prompts))
    data: list[loops.Datum] = []
    for prompt, word, own in zip(prompts, questions.values(), sampled, strict=True):
        chosen = [*tokenizer.encode(word, add_special_tokens=False), tokenizer.eos_token_id]
        data += (turn(prompt, answer) for answer in (chosen, own.sequences[0].tokens))
    return await loops.attach_reference_logprobs(data, reference)


def turn(prompt: list[int], answer: Sequence[int]) -> loops.Datum:
    """Return a question with its answer, with weight on the answer."""
    tokens = [*prompt, *answer]
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return loops.Datum(model_input=tokens[:-1], loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights})


async def preferred(trainer: loops.TrainingClient, data: list[loops.Datum]) -> float:
    """Return the share of pairs whose chosen answer gained at least a nat more on the reference than the rejected."""
    scored = await (await trainer.forward(data, "dpo")).result()
    gains = [
        float(
            (output["logprobs"].to_numpy() - datum.loss_fn_inputs["ref_logprobs"].to_numpy())
            @ datum.loss_fn_inputs["weights"].to_numpy()
        )
        for output, datum in zip(scored.loss_fn_outputs, data, strict=True)
    ]
    wins = [chosen > rejected + 1 for chosen, rejected in zip(gains[0::2], gains[1::2], strict=True)]
    return sum(wins) / len(wins)


async def answer_length(sampler: loops.SamplingClient, tokenizer: Any) -> float:
    """Return the mean number of tokens of the most likely answers to held-out questions."""
    sampled = await asyncio.gather(
        *(sampler.sample(chat(tokenizer, question), sampling_params=GREEDY) for question in HELD_OUT)
    )
    return sum(len(one.sequences[0].tokens) for one in sampled) / len(sampled)


async def main(base_model: str) -> int:
    """Train and measure; return the exit code."""
    curves = Curves(
        "Direct preference optimization: short answers",
        {"loss": "loss (nats)", "held out pairs": "preferred as wanted", "held out answers": "tokens of an answer"},
    )
    async with (
        connected(base_model) as service,
        service.training_run(base_model, rank=16, seed=1) as trainer,
        service.standalone_sampler(base_model) as reference,
    ):
        tokenizer = await trainer.get_tokenizer()
        # The answers of the untrained model and their logprobs never change, so they are sampled once.
        taught, held_out = [await pairs(reference, tokenizer, questions) for questions in (TAUGHT, HELD_OUT)]
        for step in range(STEPS + 1):
            if step % EVALUATE_EVERY == 0:
                sampler = await trainer.save_weights_and_get_sampling_client(f"step-{step}")
                share, length = await asyncio.gather(preferred(trainer, held_out), answer_length(sampler, tokenizer))
                curves.add(step, held_out_pairs=share, held_out_answers=length)
            if step < STEPS:
                forward = await trainer.forward_backward(taught, "dpo", SETTINGS)
                update = await trainer.optim_step(loops.AdamParams(learning_rate=2e-4))
                curves.add(step + 1, loss=(await forward).loss)
                await update
    curves.draw(Path("dpo.png"))
    (_, long), *_, (_, short) = curves.points["held out answers"]
    share = curves.points["held out pairs"][-1][1]
    print(
        f"held-out questions: {share:.0%} preferred as wanted; answers of {long:.1f} tokens before, {short:.1f} after"
    )
    return 0 if share == 1.0 and short < long / 2 else 1


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else BASE_MODEL)))
    except loops.LoopsError as error:
        sys.exit(f"error: {error}")
