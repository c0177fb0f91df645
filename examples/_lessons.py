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

UNSEEN_YES_NO = {
    "is ice cold?": "yes",
    "can a fish fly to the moon?": "no",
    "do birds have wings?": "yes",
    "is ten smaller than three?": "no",
    "is rome in italy?": "yes",
    "do dogs have eight legs?": "no",
}
"""More of them, to evaluate with."""


def chat(tokenizer: Any, *turns: str) -> list[int]:
    """Return the tokens of a chat in which the user and the model take turns, up to the start of the next answer."""
    return list(tokenizer.encode(_chat_text(tokenizer, turns), add_special_tokens=False))


def user_turn(tokenizer: Any, text: str, *, after: Sequence[int]) -> list[int]:
    """Return the tokens that continue a chat which ends with an answer: what the user says, up to the next answer."""
    answer = "ANSWER"
    _, continued = _chat_text(tokenizer, ["", answer, text]).split(answer, 1)
    tokens = list(tokenizer.encode(continued, add_special_tokens=False))
    return tokens[1:] if tokens[0] == after[-1] else tokens  # the model has mostly ended its turn by itself


def _chat_text(tokenizer: Any, turns: Sequence[str]) -> str:
    roles = ["system", *("user", "assistant") * len(turns)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, ["be brief", *turns], strict=False)]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


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


def reward(text: str, right: str) -> float:
    """Return 1.0 if the text is exactly the right word, 0.2 if it is the other word, else 0.0."""
    return 1.0 if text == right else 0.2 if text in ("yes", "no") else 0.0


def rewards(tokenizer: Any, samples: Sequence[SampledSequence], right: str) -> list[float]:
    """Return the reward of each sample."""
    return [reward(tokenizer.decode(sample.tokens, skip_special_tokens=True), right) for sample in samples]


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
