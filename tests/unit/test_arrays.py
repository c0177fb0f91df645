"""What was sampled, as numpy arrays."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from loops_async import SampledSequence


def test_a_completion_is_lists_and_the_same_as_arrays() -> None:
    sequence = SampledSequence(tokens=[5, 6, 7], logprobs=[-0.5, -1.0, -1.5])
    assert sequence.tokens_array.dtype == np.int64
    assert sequence.tokens_array.tolist() == sequence.tokens
    assert sequence.logprobs_array.dtype == np.float64
    assert sequence.logprobs_array.tolist() == sequence.logprobs


def test_arrays_are_made_once_and_shared_so_they_are_read_only() -> None:
    sequence = SampledSequence(tokens=[1, 2], logprobs=[-1.0, -2.0])
    assert np.shares_memory(sequence.logprobs_array, sequence.logprobs_array[1:])
    assert sequence.logprobs_array is sequence.logprobs_array
    assert sequence.tokens_array is sequence.tokens_array
    with pytest.raises(ValueError, match="read-only"):
        sequence.logprobs_array += 1.0


def test_missing_logprobs_are_nan() -> None:
    assert np.isnan(SampledSequence(tokens=[1, 2]).logprobs_array).tolist() == [True, True]


def test_arrays_do_not_travel_and_do_not_count_when_comparing() -> None:
    asked, other = SampledSequence(tokens=[1], logprobs=[-1.0]), SampledSequence(tokens=[1], logprobs=[-1.0])
    array = asked.tokens_array
    assert asked == other
    assert len(pickle.dumps(asked)) == len(pickle.dumps(other))
    assert pickle.loads(pickle.dumps(asked)).tokens_array is not array
