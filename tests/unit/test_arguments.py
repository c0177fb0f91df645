"""Arguments are checked before anything is sent; a refusal names the field, the value and the rule."""

from __future__ import annotations

import math
import pickle
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops_async import (
    AdamParams,
    CreateRunRequest,
    CreateSamplerRequest,
    Datum,
    EncodedTextChunk,
    InputError,
    LossFnType,
    ModelInput,
    SamplingParams,
    TensorData,
    WandbConfig,
)
from loops_async._arguments import (
    check,
    check_at_least,
    check_config,
    check_finite,
    check_kind,
    check_model_input,
    check_positive,
    checked_data,
)
from loops_async.protocol import LOSSES

HUGE = pytest.param(10**400, id="400 digits")


def refusal(call: Any, *arguments: Any, **named: Any) -> InputError:
    with pytest.raises(InputError) as refused:
        call(*arguments, **named)
    assert isinstance(refused.value, ValueError)
    assert not refused.value.retryable
    assert str(refused.value).startswith(f"{refused.value.path}: ")
    assert pickle.loads(pickle.dumps(refused.value)).path == refused.value.path
    return refused.value


def check_data(
    data: Any, loss_fn: Any, config: Any, *, max_seq_len: int | None = None
) -> tuple[list[Datum], dict[str, Any] | None]:
    """Check all arguments of a pass."""
    kept = check_config(loss_fn, config)
    return list(checked_data(data, loss_fn, max_seq_len=max_seq_len)), kept


RUN: dict[str, Any] = {"session_id": "s", "base_model": "m"}


@pytest.mark.parametrize(
    ("value", "path", "said"),
    [
        (AdamParams(learning_rate=-1.0), "learning_rate", ">= 0.0; got -1.0"),
        (AdamParams(learning_rate=math.nan), "learning_rate", "got nan"),
        (AdamParams(learning_rate=math.inf), "learning_rate", "got inf"),
        (AdamParams(learning_rate="1e-4"), "learning_rate", "`float`, got `str`; got '1e-4'"),  # type: ignore[arg-type]
        (AdamParams(learning_rate=None), "learning_rate", "got None"),  # type: ignore[arg-type]
        (AdamParams(beta1=1.0), "beta1", "< 1.0; got 1.0"),
        (AdamParams(eps=0.0), "eps", "> 0.0; got 0.0"),
        (AdamParams(grad_clip_norm=-0.1), "grad_clip_norm", ">= 0.0; got -0.1"),
        (SamplingParams(max_tokens=0), "max_tokens", ">= 1; got 0"),
        (SamplingParams(max_tokens=True), "max_tokens", "got True"),
        (SamplingParams(top_p=1.5), "top_p", "<= 1.0; got 1.5"),
        (SamplingParams(top_k=-2), "top_k", ">= -1; got -2"),
        (SamplingParams(stop=[1.5]), "stop[0]", "got 1.5"),  # type: ignore[list-item]
        (SamplingParams(stop=object()), "stop", "<object object"),  # type: ignore[arg-type]
        (SamplingParams(seed="x"), "seed", "got 'x'"),  # type: ignore[arg-type]
        (WandbConfig(project=""), "project", "got ''"),
        (CreateRunRequest(**{**RUN, "session_id": ""}), "session_id", "got ''"),
        (CreateRunRequest(**{**RUN, "base_model": ""}), "base_model", "got ''"),
        (CreateRunRequest(**{**RUN, "base_model": 5}), "base_model", "`str`, got `int`; got 5"),
        (CreateRunRequest(**RUN, lora_rank=0), "lora_rank", ">= 1; got 0"),
        (CreateRunRequest(**RUN, replicas=0), "replicas", ">= 1; got 0"),
        (CreateRunRequest(**RUN, scale_down_delay_seconds=0), "scale_down_delay_seconds", "got 0"),
        (CreateRunRequest(**RUN, max_seq_len=0), "max_seq_len", ">= 1; got 0"),
        (CreateRunRequest(**RUN, name=""), "name", "got ''"),
        (CreateRunRequest(**RUN, name="x" * 256), "name", "255"),
        (CreateSamplerRequest(session_id="s", num_replicas=0), "num_replicas", ">= 1; got 0"),
        (CreateSamplerRequest(session_id="s", max_seq_length=-1), "max_seq_length", ">= 1; got -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rules_of_a_struct(value: Any, path: str, said: str) -> None:
    for prefix in ("", "params"):
        refused = refusal(check, value, path=prefix)
        assert refused.path == ".".join(filter(None, (prefix, path)))
        assert said in str(refused)


@given(
    st.builds(
        AdamParams,
        learning_rate=st.floats(0, 1e308),
        beta1=st.floats(0, 1, exclude_max=True),
        beta2=st.floats(0, 1, exclude_max=True),
        eps=st.floats(0, 1e308, exclude_min=True),
        weight_decay=st.floats(0, 1e308),
        grad_clip_norm=st.one_of(st.floats(0, 1e308), st.integers(0, 100)),
    )
)
def test_what_keeps_every_rule_is_returned(params: AdamParams) -> None:
    assert check(params) == params


@pytest.mark.parametrize("scalar", [np.float64(1e-4), np.float32(1e-4)])
def test_a_schedule_in_numpy_is_a_schedule(scalar: Any) -> None:
    checked = check(AdamParams(learning_rate=scalar)).learning_rate
    assert type(checked) is float
    assert checked == float(scalar)


def test_what_is_sent_does_not_change_with_what_was_given() -> None:
    scheduled = np.array(1e-4)
    stop = [7, np.int64(8)]
    params, how = check(AdamParams(learning_rate=scheduled)), check(SamplingParams(stop=stop, max_tokens=np.int64(5)))  # type: ignore[arg-type]
    scheduled[...] = 5.0
    stop.clear()
    assert params.learning_rate == 1e-4
    assert (how.stop, how.max_tokens, type(how.max_tokens)) == ([7, 8], 5, int)


@pytest.mark.parametrize("scalar", [np.int64(3), np.array(3), np.uint8(3)], ids=repr)
def test_whole_numbers_of_arrays(scalar: Any) -> None:
    assert type(check_at_least(scalar, 1, "rank")) is int
    assert check_at_least(scalar, 1, "rank") == 3
    assert check_positive(scalar, "timeout") == 3


@pytest.mark.parametrize("value", [np.float64(3.0), np.array([3]), np.bool_(True), np.int64(0)], ids=repr)
def test_arrays_and_other_scalars_are_no_whole_numbers(value: Any) -> None:
    assert "whole number of at least 1; got" in str(refusal(check_at_least, value, 1, "rank"))


@pytest.mark.parametrize("value", [None, 5, {"learning_rate": 1e-4}, AdamParams, SamplingParams()], ids=repr)
def test_the_wrong_kind(value: Any) -> None:
    assert "expected AdamParams, got" in str(refusal(check_kind, value, AdamParams, "adam_params"))


@pytest.mark.parametrize("value", [0, -1, 0.0, math.nan, math.inf, HUGE, "1", None, True])
def test_seconds(value: Any) -> None:
    assert refusal(check_positive, value, "timeout").path == "timeout"


@pytest.mark.parametrize("value", [math.nan, -math.inf, HUGE, "1", None])
def test_finite_numbers(value: Any) -> None:
    assert refusal(check_finite, value, "lag").path == "lag"


@pytest.mark.parametrize(
    "value", [b"\n", datetime(2026, 1, 1, tzinfo=UTC), Decimal(1), np.datetime64(3, "s"), np.longdouble(3)], ids=repr
)
def test_what_is_neither_text_nor_a_number_is_not_made_text(value: Any) -> None:
    assert refusal(check, SamplingParams(stop=value)).path == "stop"
    assert refusal(check, SamplingParams(stop=[value])).path in ("stop", "stop[0]")


@pytest.mark.parametrize("value", [0, -5, 1.0, "1", None, True])
def test_whole_numbers(value: Any) -> None:
    assert "at least 1; got" in str(refusal(check_at_least, value, 1, "rank"))


# --- prompts ---


def test_a_list_is_a_prompt() -> None:
    assert check_model_input([1, 2], "prompt") == ModelInput.from_ints([1, 2])
    assert check_model_input(np.array([1, 2]), "prompt") == ModelInput.from_ints([1, 2])


@pytest.mark.parametrize(
    ("prompt", "path", "said"),
    [
        ([], "prompt", "at least one token"),
        (ModelInput.empty(), "prompt", "at least one token"),
        ("text", "prompt", "got str"),
        (None, "prompt", "got NoneType"),
        (["a"], "prompt", "got str"),
        ([1.5], "prompt", "got float"),
        (ModelInput(["a"]), "prompt.chunks[0]", "got str"),  # type: ignore[list-item]
        ([1] * 9, "prompt", "has 9 tokens, more than max_seq_len=8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_prompts(prompt: Any, path: str, said: str) -> None:
    refused = refusal(check_model_input, prompt, "prompt", max_seq_len=8)
    assert refused.path == path
    assert said in str(refused)


# --- training data ---


def datum(**inputs: Any) -> Datum:
    return Datum(model_input=[1, 2], loss_fn_inputs=inputs)


TENSOR = TensorData(data=[1.0, 2.0], dtype="float32", shape=[2])
INPUTS = "data[0].loss_fn_inputs"
PAIRS = [[1, 2], [3, 4]]
ON_POLICY = [datum(logprobs=[0.0, 0.0], advantages=[1.0])]
PREFERENCE = [datum(target_tokens=[1, 2], weights=[1.0, 1.0], ref_logprobs=[0.0, 0.0])] * 2


def raw(**changes: Any) -> TensorData:
    return TensorData(**{"data": [1.0, 2.0], "dtype": "float32", "shape": [2], **changes})


@pytest.mark.parametrize(
    ("data", "loss_fn", "config", "path", "said"),
    [
        ([], "cross_entropy", None, "data", "at least one Datum"),
        (None, "cross_entropy", None, "data", "got NoneType"),
        (datum(), "cross_entropy", None, "data", "got Datum"),
        ((one for one in ()), "cross_entropy", None, "data", "got generator"),
        (["x"], "cross_entropy", None, "data[0]", "expected Datum, got str"),
        ([datum()], "crossentropy", None, "loss_fn", "must be one of cross_entropy, importance_sampling, ppo"),
        ([datum()], None, None, "loss_fn", "got None"),
        ([datum()], ["ppo"], None, "loss_fn", "got ['ppo']"),
        ([datum(), Datum(model_input=[])], "cross_entropy", None, "data[1].model_input", "at least one token"),
        ([Datum(model_input=[1] * 9)], "cross_entropy", None, "data[0].model_input", "max_seq_len=8"),
        ([datum()], "ppo", None, "data[0].loss_fn_inputs", "ppo needs logprobs, advantages; missing"),
        ([datum(logprobs=[0.0, 0.0])], "dro", None, "data[0].loss_fn_inputs", "missing ['advantages']"),
        ([datum(weights=[1.0])], "cross_entropy", None, "data[0].loss_fn_inputs['weights']", "each of the 2 positions"),
        (
            [datum(logprobs=[0.0, 0.0], advantages=[1.0, 1.0, 1.0])],
            "ppo",
            None,
            "data[0].loss_fn_inputs['advantages']",
            "shape is [3]",
        ),
        ([datum(x=raw(shape=[3]))], "cross_entropy", None, "data[0].loss_fn_inputs['x']", "does not hold 2 numbers"),
        ([datum(x=raw(dtype="f32"))], "cross_entropy", None, "data[0].loss_fn_inputs['x']", "got 'f32'"),
        ([datum(target_tokens=[1.0, 2.0])], "cross_entropy", None, f"{INPUTS}['target_tokens']", "must be integers"),
        ([datum(target_tokens=PAIRS)], "ppo", None, "data[0].loss_fn_inputs", "ppo needs logprobs, advantages"),
        (
            [datum(target_tokens=PAIRS, logprobs=[0.0, 0.0], advantages=[1.0])],
            "ppo",
            None,
            f"{INPUTS}['target_tokens']",
            "must have the shape [2] for ppo, as model_input has 2 positions; got [2, 2]",
        ),
        ([datum(target_tokens=[PAIRS, PAIRS])], "cross_entropy", None, f"{INPUTS}['target_tokens']", "[2] or [2, K]"),
        (
            [datum(target_tokens=raw(data=[], dtype="int64", shape=[2, 0]))],
            "cross_entropy",
            None,
            f"{INPUTS}['target_tokens']",
            "got [2, 0]",
        ),
        (
            [datum(weights=PAIRS)],
            "cross_entropy",
            None,
            f"{INPUTS}['weights']",
            "the shape of the targets, [2]; got [2, 2]",
        ),
        (
            [datum(target_tokens=[1, 2]), datum(target_tokens=PAIRS)],
            "cross_entropy",
            None,
            "data[1].loss_fn_inputs['target_tokens']",
            "the same rank and K; shapes are [2], [2, 2]",
        ),
        (
            [datum(target_tokens=PAIRS, weights=[1.0, 1.0])],
            "cross_entropy",
            None,
            f"{INPUTS}['weights']",
            "must have the shape of the targets, [2, 2]; got [2]",
        ),
        (
            ON_POLICY,
            "ppo",
            {"clip_low_threshold": -0.1},
            "loss_fn_config['clip_low_threshold']",
            "at least 0; got -0.1",
        ),
        (ON_POLICY, "ppo", {"clip_low_threshold": 1.3}, "loss_fn_config['clip_low_threshold']", "got 1.3, 1.2"),
        (PREFERENCE, "dpo", {"label_smoothing": 1.5}, "loss_fn_config['label_smoothing']", "from 0 to 1; got 1.5"),
        ([datum()], "cross_entropy", [], "loss_fn_config", "expected a dict, got list"),
        ([datum()], "cross_entropy", {"beta": 1.0}, "loss_fn_config['beta']", "has skip_token_normalization"),
        (
            [datum(logprobs=[0.0, 0.0], advantages=[1.0])],
            "importance_sampling",
            {"beta": 1.0},
            "loss_fn_config['beta']",
            "unknown setting; importance_sampling has skip_token_normalization",
        ),
        (
            [datum()],
            "cross_entropy",
            {"skip_token_normalization": 1},
            "loss_fn_config['skip_token_normalization']",
            "must be true or false; got 1",
        ),
        (
            [datum(logprobs=[0.0, 0.0], advantages=[1.0])],
            "dro",
            {"beta": math.nan},
            "loss_fn_config['beta']",
            "must be a finite number of at least 0; got nan",
        ),
        (
            [datum(logprobs=[0.0, 0.0], advantages=[1.0])],
            "dro",
            {"beta": True},
            "loss_fn_config['beta']",
            "must be a finite number of at least 0; got True",
        ),
        (
            [datum(logprobs=[0.0, 0.0], advantages=[1.0])],
            "dro",
            {"beta": 10**400},
            "loss_fn_config['beta']",
            "must be a finite number",
        ),
        (
            PREFERENCE,
            "dpo",
            {"clip_low_threshold": 0.5},
            "loss_fn_config['clip_low_threshold']",
            "unknown setting; dpo has beta, label_smoothing, skip_token_normalization",
        ),
        (
            [datum(ref_logprobs=[0.0, 0.0])] * 2,
            "dpo",
            None,
            INPUTS,
            "dpo needs target_tokens, ref_logprobs; missing ['target_tokens']",
        ),
        (
            [datum(target_tokens=[1, 2], weights=[1.0, 1.0], ref_logprobs=[0.0, 0.0])] * 3,
            "dpo",
            None,
            "data",
            "an even number of datums; got 3",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_training_data(data: Any, loss_fn: Any, config: Any, path: str, said: str) -> None:
    refused = refusal(check_data, data, loss_fn, config, max_seq_len=8)
    assert refused.path == path
    assert said in str(refused)


def test_the_names_that_type_checkers_know_are_those_of_the_table() -> None:
    assert get_args(LossFnType) == tuple(LOSSES)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_every_loss_takes_what_it_needs(loss_fn: str) -> None:
    rule = LOSSES[loss_fn]
    numbers = {name: [1, 2] if name == "target_tokens" else [-1.0, -2.0] for name in rule.inputs}
    data = [datum(**numbers)] * 2
    assert check_data(tuple(data), loss_fn, None) == (data, None)
    data = [datum(**{name: numbers[name] for name in rule.required})] * 2
    config = {name: True if setting.default is False else 0.5 for name, setting in rule.settings.items()}
    assert check_data(data, loss_fn, config) == (data, config)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_only_what_was_given_is_sent(loss_fn: str) -> None:
    numbers = {name: [1, 2] if name == "target_tokens" else [0.0, 0.0] for name in LOSSES[loss_fn].inputs}
    data = [datum(**numbers)] * 2
    _, kept = check_data(data, loss_fn, {"skip_token_normalization": True})
    assert kept == {"skip_token_normalization": True}
    assert refusal(check_data, data, loss_fn, {"x": 1}).path == "loss_fn_config['x']"


POLICY: dict[str, Any] = {"target_tokens": [1, 2], "logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("loss_fn", "inputs", "name", "said"),
    [
        ("ppo", POLICY | {"weights": [0.0, 1.0]}, "weights", "a position whose advantages are 0 does not count"),
        ("ppo", POLICY | {"ref_logprobs": [0.0, 0.0]}, "ref_logprobs", "only logprobs, advantages, target_tokens"),
        ("cross_entropy", {"target_tokens": [1, 2], "weight": [0.0, 1.0]}, "weight", "did you mean 'weights'?"),
        ("cross_entropy", POLICY, "logprobs", "cross_entropy does not read it, only target_tokens, weights"),
        ("cross_entropy", {"targets": [1, 2]}, "targets", "did you mean 'target_tokens'?"),
    ],
)
def test_inputs_that_the_loss_does_not_read(loss_fn: str, inputs: dict[str, Any], name: str, said: str) -> None:
    refused = refusal(check_data, [datum(**inputs)], loss_fn, None)
    assert refused.path == f"{INPUTS}[{name!r}]"
    assert said in str(refused)


@pytest.mark.parametrize(
    ("loss_fn", "inputs", "key"),
    [
        ("cross_entropy", {}, "weights"),
        ("cross_entropy", {"weights": [1.0, 1.0]}, "weights"),
        ("cross_entropy", {"weights": [math.nan, 1.0]}, "weights"),
        ("cross_entropy", {"target_tokens": PAIRS, "weights": [[0.0, 1.0], [1.0, 1.0]]}, "weights"),
        ("ppo", POLICY, "advantages"),
        ("ppo", POLICY | {"advantages": [1.0]}, "advantages"),
    ],
)
def test_a_mask_of_a_position_that_counts(loss_fn: str, inputs: dict[str, Any], key: str) -> None:
    refused = refusal(check_data, [datum(**inputs, mask=[0.0, 1.0])], loss_fn, None)
    assert refused.path == f"{INPUTS}['mask']"
    assert f"masks position 0, which {loss_fn} counts" in str(refused)
    assert f"set {key} to 0 there" in str(refused)


@pytest.mark.parametrize(
    ("loss_fn", "inputs"),
    [
        ("cross_entropy", {"weights": [0.0, 1.0]}),
        ("cross_entropy", {"target_tokens": [-100, 2]}),
        ("cross_entropy", {"target_tokens": PAIRS, "weights": [[0.0, 0.0], [1.0, 1.0]]}),
        ("ppo", POLICY | {"advantages": [0.0, 1.0]}),
        ("ppo", POLICY | {"advantages": [0.0]}),
        ("ppo", POLICY | {"target_tokens": [-100, 2], "advantages": [1.0]}),
    ],
)
def test_a_mask_of_positions_that_do_not_count_is_not_sent(loss_fn: str, inputs: dict[str, Any]) -> None:
    given, bare = datum(**inputs, mask=[0.0, 1.0]), datum(**inputs)
    assert check_data([given, bare], loss_fn, None)[0] == [bare, bare]
    assert "mask" in given.loss_fn_inputs


def test_a_mask_has_one_entry_for_each_position() -> None:
    masked = datum(target_tokens=PAIRS, mask=[[0.0, 1.0], [1.0, 1.0]])
    assert "must have the shape [2]; got [2, 2]" in str(refusal(check_data, [masked], "cross_entropy", None))


@pytest.mark.parametrize(
    ("loss_fn", "inputs", "name", "said"),
    [
        ("ppo", POLICY | {"advantages": [math.inf, 0.0]}, "advantages", "finite: JSON has no infinity; got inf at pos"),
        ("ppo", POLICY | {"advantages": [10**400, math.nan]}, "advantages", "at position 0"),
        ("ppo", POLICY | {"logprobs": [math.nan, -math.inf]}, "logprobs", "got -inf at position 1"),
        ("ppo", POLICY | {"logprobs": [-1.0, 0.5]}, "logprobs", "must not be greater than 0; give logprobs in nats"),
        ("cross_entropy", {"weights": np.array([np.inf, 1.0])}, "weights", "got inf at position 0"),
        ("cross_entropy", {"weights": raw(data=["1", 2.0])}, "weights", "must hold numbers; got '1'"),
        ("cross_entropy", {"target_tokens": raw(data=[1.5, 2], dtype="int64")}, "target_tokens", "hold int values"),
        ("cross_entropy", {"target_tokens": raw(data=[None, 2], dtype="int64")}, "target_tokens", "got None"),
        ("cross_entropy", {"target_tokens": [1, 1 << 63]}, "target_tokens", "got 9223372036854775808 at position 1"),
    ],
)
def test_numbers_that_cannot_be_sent(loss_fn: str, inputs: dict[str, Any], name: str, said: str) -> None:
    refused = refusal(check_data, [datum(**inputs)], loss_fn, None)
    assert refused.path == f"{INPUTS}[{name!r}]"
    assert said in str(refused)


def test_nan_and_rounded_logprobs_are_sent() -> None:
    data = [datum(**POLICY | {"logprobs": [math.nan, 1e-6], "advantages": [math.nan, 1.0]})]
    check_data(data, "ppo", None)


def test_settings_of_arrays_are_numbers() -> None:
    _, config = check_data([datum(**POLICY)], "ppo", {"clip_low_threshold": np.float32(0.5)})
    assert config == {"clip_low_threshold": 0.5}
    assert type(config["clip_low_threshold"]) is float
    _, config = check_data([datum(**POLICY)], "ppo", {"skip_token_normalization": np.bool_(True)})
    assert config == {"skip_token_normalization": True}


def test_the_list_of_examples_is_copied() -> None:
    data = [datum()]
    checked = checked_data(data, "cross_entropy")
    data.clear()
    assert list(checked) == [datum()]


def test_examples_are_checked_one_by_one() -> None:
    checked = checked_data([datum(), datum(weights=[1.0])], "cross_entropy")
    assert next(checked) == datum()
    assert refusal(next, checked).path == "data[1].loss_fn_inputs['weights']"


def test_shapes_that_fit() -> None:
    several = [[1, 2, 3], [4, 5, 6]]
    check_data([datum(target_tokens=several, weights=np.ones((2, 3)))], "cross_entropy", None)
    check_data([datum(logprobs=[0.0, 0.0], advantages=[1.0])], "ppo", None)


def test_a_configuration_is_copied() -> None:
    config = {"skip_token_normalization": True}
    _, kept = check_data([datum()], "cross_entropy", config)
    config.clear()
    assert kept == {"skip_token_normalization": True}


def test_chunks_of_ones_own() -> None:
    prompt = ModelInput([EncodedTextChunk([1]), EncodedTextChunk([2])])
    assert check_model_input(prompt, "prompt") is prompt
