"""Episodes: what is appended, what is refused, and the training example that comes out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops_async import Episode, ImageChunk, InputError, ModelInput, SampledSequence, SampleResponse
from loops_async._arguments import checked_data


def answer(*logprobs: float, first: int = 100, stop_reason: str = "stop") -> SampledSequence:
    tokens = list(range(first, first + len(logprobs)))
    return SampledSequence(tokens=tokens, logprobs=list(logprobs), stop_reason=stop_reason)


def finished() -> Episode:
    episode = Episode.start([1, 2]).act(answer(-0.5, -0.25))
    episode.reward = 1.0
    return episode


def test_what_is_kept_of_each_token() -> None:
    episode = Episode.start([1, 2]).act(answer(-0.5), policy_version=3).observe([3]).act(answer(-0.25, -0.125))
    assert episode.tokens == [1, 2, 100, 3, 100, 101]
    assert episode.mask == [False, False, True, False, True, True]
    assert episode.versions == [-1, -1, 3, -1, -1, -1]
    assert [None if math.isnan(one) else one for one in episode.logprobs] == [None, None, -0.5, None, -0.25, -0.125]
    assert (episode.turns, episode.sampled_tokens, episode.reward) == (2, 3, None)


@pytest.mark.parametrize("tokens", [[5, 6], (5, 6), np.array([5, 6])], ids=["list", "tuple", "array"])
def test_tokens_of_every_kind(tokens: Any) -> None:
    assert Episode.start(tokens).observe(tokens).tokens == [5, 6, 5, 6]
    assert Episode.start(ModelInput.from_ints(tokens).append_int(7)).tokens == [5, 6, 7]


def test_episodes_share_nothing_with_what_they_were_given() -> None:
    prompt, sequence = [1], answer(-0.5)
    first, second = (Episode.start(prompt).act(sequence) for _ in range(2))
    first.observe([9])
    first.metrics["steps"] = 1.0
    assert (prompt, sequence.tokens, sequence.logprobs) == ([1], [100], [-0.5])
    assert (second.tokens, second.metrics) == ([1, 100], {})


@pytest.mark.parametrize(("stop_reason", "is_truncated"), [("stop", False), ("length", True), ("new", False)])
def test_truncation_is_what_the_last_answer_says(stop_reason: str, *, is_truncated: bool) -> None:
    episode = Episode.start([1])
    assert not episode.is_truncated
    episode.act(answer(-0.5, stop_reason="length")).act(answer(-0.5, stop_reason=stop_reason))
    assert (episode.stop_reason, episode.is_truncated) == (stop_reason, is_truncated)


def test_without_room_there_is_an_empty_answer() -> None:
    episode = Episode.start([1, 2]).act(SampledSequence(stop_reason="length"))
    assert (episode.tokens, episode.is_truncated, episode.sampled_tokens) == ([1, 2], True, 0)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (SampledSequence(tokens=[1]), "logprobs: needs one logprob for each of the 1 tokens; has 0"),
        (SampledSequence(tokens=[1], logprobs=[-1.0, -1.0]), "logprobs: needs one logprob"),
        (answer(-1.0, math.nan, -1.0), r"logprobs\[1\]: must be finite and at most 0, in nats; got nan"),
        (answer(-math.inf), r"logprobs\[0\]: must be finite"),
        (answer(math.inf, -math.inf), r"logprobs\[0\]: must be finite"),
        (SampledSequence(tokens=[1, 2], logprobs=[-1.0, None]), r"logprobs\[1\].*; got None"),  # type: ignore[list-item]
        (answer(-1.0, 0.5), r"logprobs\[1\]: must be finite and at most 0, in nats; got 0.5"),
        (SampledSequence(tokens=[1.5], logprobs=[-1.0]), "sequence.tokens: expected integers"),  # type: ignore[list-item]
        (SampleResponse(sequences=[answer(-1.0)]), r"expected a SampledSequence, e.g. response.sequences\[0\]"),
    ],
    ids=["none", "too many", "nan", "minus infinity", "infinity", "None", "positive", "tokens", "response"],
)
def test_answers_that_cannot_be_trained_on_are_refused(sequence: Any, message: str) -> None:
    episode = Episode.start([1, 2])
    with pytest.raises(InputError, match=message):
        episode.act(sequence)
    assert (episode.tokens, episode.turns, episode.stop_reason) == ([1, 2], 0, None)


IMAGE = ModelInput([ImageChunk(data=b"x", format="png", expected_tokens=1)])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "at least one token"), ("text", "encode it first"), ([1.5], "integers"), (IMAGE, "has an image")],
)
def test_prompts_that_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        Episode.start(prompt)
    assert refused.value.path == "prompt"


def test_logprobs_may_be_an_array() -> None:
    array: Any = np.array([-0.5, -0.25])
    episode = Episode.start([1]).act(SampledSequence(tokens=[2, 3], logprobs=array))
    assert episode.logprobs[1:] == [-0.5, -0.25]
    assert {type(each) for each in episode.logprobs} == {float}


@pytest.mark.parametrize("name", ["logprobs", "mask", "versions", "tokens"])
def test_lists_of_unequal_lengths_are_found(name: str) -> None:
    episode = finished()
    getattr(episode, name).pop()
    with pytest.raises(InputError, match="needs one entry for each of the"):
        episode.check()
    with pytest.raises(InputError, match="needs one entry for each of the"):
        episode.datum(1.0)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, "1", [1.0]], ids=repr)
def test_rewards_that_are_no_finite_numbers_are_found(reward: Any) -> None:
    episode = finished()
    episode.reward = reward
    with pytest.raises(InputError, match="reward: must be a finite number"):
        episode.check()


@pytest.mark.parametrize("reward", [None, True, 1, -0.5, np.float32(0.5)], ids=repr)
def test_rewards_that_are_numbers(reward: Any) -> None:
    episode = finished()
    episode.reward = reward
    episode.check()


def test_a_logprob_that_was_overwritten_is_found() -> None:
    episode = finished()
    episode.logprobs[-1] = math.nan
    with pytest.raises(InputError, match="must be finite where a token was sampled"):
        episode.check()


@pytest.mark.parametrize("advantage", [math.nan, math.inf, None], ids=repr)
def test_advantages_that_are_no_finite_numbers_are_refused(advantage: Any) -> None:
    with pytest.raises(InputError, match="advantage: must be a finite number"):
        finished().datum(advantage)


def test_one_token_is_no_example() -> None:
    with pytest.raises(InputError, match="at least two tokens"):
        Episode.start([1]).datum(1.0)


# --- alignment ---

tokens = st.lists(st.integers(0, 2**31), max_size=5)
logprobs = st.lists(st.floats(-1e6, 0.0), max_size=5)
parts = st.lists(tokens.map(lambda given: ("observe", given)) | logprobs.map(lambda given: ("act", given)), max_size=8)


@given(st.lists(st.integers(0, 2**31), min_size=2, max_size=5), parts, st.floats(-1e6, 1e6))
def test_the_example_is_what_the_definition_says(prompt: list[int], parts: list[Any], advantage: float) -> None:
    """Each position's target is the next token; the others are looked up by the target's place in the episode."""
    episode = Episode.start(prompt)
    sampled: dict[int, float] = {}
    for kind, values in parts:
        if kind == "observe":
            episode.observe(values)
        else:
            sampled |= {len(episode.tokens) + offset: logprob for offset, logprob in enumerate(values)}
            episode.act(answer(*values))
    datum = episode.datum(advantage)

    assert datum.model_input.length == len(episode.tokens) - 1
    assert set(datum.loss_fn_inputs) == {"target_tokens", "logprobs", "advantages"}
    inputs = {name: tensor.tolist() for name, tensor in datum.loss_fn_inputs.items()}
    for position, token in enumerate(datum.model_input.to_ints()):
        place = position + 1
        assert token == episode.tokens[position]
        assert inputs["target_tokens"][position] == episode.tokens[place]
        assert inputs["logprobs"][position] == sampled.get(place, 0.0)
        assert inputs["advantages"][position] == (advantage if place in sampled else 0.0)
    assert {name: tensor.dtype for name, tensor in datum.loss_fn_inputs.items()} == {
        "target_tokens": "int64",
        "logprobs": "float32",
        "advantages": "float32",
    }


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro"])
@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_the_losses_accept_the_example(loss_fn: str, advantage: float) -> None:
    assert list(checked_data([finished().datum(advantage)], loss_fn))
