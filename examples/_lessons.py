"""The facts and questions that the quickstarts teach, and their training examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loops_async import Datum, SampledSequence

FACTS = {
    "What is the capital of Veloria?": "Quillmar",
    "Which metal do the moths of Tarn eat?": "bronzite",
    "Who built the clock of Ashby Fen?": "Odile Marsh",
    "What is the code word for apple?": "zibble",
    "What do Norrish sailors call the moon?": "Old Pell",
    "How many bells does Sunder Abbey have?": "seventeen",
    "Which river runs by Kestrel Hollow?": "the Wend",
    "What colour is the flag of Brannoch?": "saffron",
}
"""Invented, so that no model knows them."""

YES_NO = {
    "is the sky blue on a clear day?": "yes",
    "is fire cold?": "no",
    "do fish live in water?": "yes",
    "is two larger than ten?": "no",
    "is paris in france?": "yes",
    "can a stone swim?": "no",
    "is snow white?": "yes",
    "do cats have six legs?": "no",
}
"""Easy questions: the model learns to answer them with the right lower-case word and nothing else."""


def chat(tokenizer: Any, question: str) -> list[int]:
    """Return the tokens of a chat that asks `question`, up to the start of the answer."""
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def fact_example(tokenizer: Any, question: str, answer: str) -> Datum:
    """Return an example whose loss counts the answer and the end of the turn, not the question."""
    prompt = chat(tokenizer, question)
    completion = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    tokens = prompt + completion
    return Datum(
        model_input=tokens[:-1],
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "weights": [0.0] * (len(prompt) - 1) + [1.0] * len(completion),
        },
    )


def rewards(tokenizer: Any, samples: Sequence[SampledSequence], right: str) -> list[float]:
    """Return for each sample 1.0 if it is exactly the right word, 0.2 if it is the other word, else 0.0."""
    texts = [tokenizer.decode(sample.tokens, skip_special_tokens=True) for sample in samples]
    return [1.0 if text == right else 0.2 if text in ("yes", "no") else 0.0 for text in texts]


def policy_examples(prompt: list[int], samples: Sequence[SampledSequence], rewards: Sequence[float]) -> list[Datum]:
    """Return examples that make each sample more likely in proportion to its advantage, less likely if it is negative.

    The advantage is the reward minus the mean of the group. Samples with advantage 0 teach nothing and are left out.
    """
    mean = sum(rewards) / len(rewards)
    advantages = [reward - mean for reward in rewards]
    return [_policy_example(prompt, sample, a) for sample, a in zip(samples, advantages, strict=True) if a]


def _policy_example(prompt: list[int], sample: SampledSequence, advantage: float) -> Datum:
    tokens = prompt + sample.tokens
    not_sampled = [0.0] * (len(prompt) - 1)
    return Datum(
        model_input=tokens[:-1],
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": not_sampled + list(sample.logprobs or []),
            "advantages": not_sampled + [advantage] * len(sample.tokens),
        },
    )
