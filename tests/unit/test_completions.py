"""Answers to samples, damaged at random: each is read, or refused with the one error that says so."""

from __future__ import annotations

import json
import random

import pytest

from loops_async import ProtocolError
from loops_async._sampling.completions import read_completions
from loops_async._work.usage import Counts

ANSWER = json.dumps(
    {
        "choices": [
            {
                "index": 0,
                "text": "caf\u00e9 \U0001f600",
                "finish_reason": "stop",
                "token_ids": [5, 6],
                "logprobs": {"tokens": ["token_id:5", "token_id:6"], "token_logprobs": [-0.5, None]},
                "prompt_logprobs": [None, {"2": {"logprob": -0.25, "rank": 1, "decoded_token": "b"}}],
                "prompt_token_ids": [1, 2],
                "routed_experts_ref": {"uri": "bt://x", "version": 1},
            },
            {"text": "x", "logprobs": {"tokens": ["token_id:7"], "token_logprobs": [-1.0]}},
        ],
        "usage": {"completion_tokens": 3},
    }
).encode()

ODD = [
    b"null",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 5000,
    b'{"a":' * 5000,
    b'"\\ud83d"',
    b"\xff",
    b"\x00",
    b"{}",
    b"[]",
    b'"',
    b",",
    b"true",
    b"-1",
    b"0.5",
]


def mutated(numbers: random.Random) -> bytes:
    """Replace, insert, delete or cut, once to three times."""
    body = ANSWER
    for _ in range(numbers.randrange(1, 4)):
        start = numbers.randrange(len(body) + 1)
        end = min(len(body), start + numbers.randrange(12))
        put = numbers.choice([*ODD, b"", bytes([numbers.randrange(256)])])
        body = body[:start] + put + body[end:] if numbers.random() < 0.9 else body[:start]
    return body


@pytest.mark.parametrize(
    ("reported", "prompt", "completion"),
    [
        ({"prompt_tokens": 40, "completion_tokens": 30}, 40, 30),
        ({"completion_tokens": 30}, 2, 30),
        ({"prompt_tokens": -1, "completion_tokens": None}, 2, 3),
        ({"prompt_tokens": "many"}, 2, 3),
        (None, 2, 3),
    ],
)
def test_tokens_are_counted_as_reported_and_else_as_received(reported: object, prompt: int, completion: int) -> None:
    counts = Counts()
    body = json.dumps(json.loads(ANSWER) | {"usage": reported}).encode()
    read_completions(body, prompt=[1, 2], topk=0, counts=counts)
    assert (counts.samples, counts.prompt_tokens, counts.completion_tokens) == (1, prompt, completion)


def test_a_prompt_with_images_has_the_length_that_was_sent() -> None:
    counts = Counts()
    read_completions(b'{"choices": []}', prompt=[], topk=0, counts=counts, prompt_length=70)
    assert (counts.prompt_tokens, counts.completion_tokens) == (70, 0)


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_raises_another_error(seed: int) -> None:
    numbers = random.Random(seed)
    read = longest = 0
    for _ in range(500):
        body = mutated(numbers)
        try:
            answer = read_completions(body, prompt=[1, 2], topk=2)
        except ProtocolError as error:
            longest = max(longest, len(str(error)))
            continue
        read += 1
        json.dumps([sequence.text for sequence in answer.sequences], ensure_ascii=False).encode()
        assert all(token.bit_length() < 64 for sequence in answer.sequences for token in sequence.tokens)
    assert longest < 1000
    assert read > 100
