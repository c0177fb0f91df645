"""What a trainer refuses: the text names the datum, the field and the rule, and nothing has changed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loops_async.types import AdamParams, Datum, ImageChunk, ModelInput, TensorData
from loops_async.types.inputs import ExternalRef
from loops_local.engine.base import Engine, RefusedError, Trainer

from .tools import text, weights

GOOD = text("a", "b")
RL = {"logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]}


def _datum(tokens: list[int] | None = None, **inputs: Any) -> Datum:
    return Datum(model_input=tokens or [1, 2], loss_fn_inputs=inputs)


def _raw(data: list[Any], dtype: str, shape: list[int]) -> TensorData:
    return TensorData(data=data, dtype=dtype, shape=shape)


IMAGE = Datum(model_input=ModelInput([ImageChunk(data=b"", format="png", expected_tokens=2)]))
ROUTED = Datum(model_input=[1], routed_experts_ref=ExternalRef(uri="x", version=1))

CASES: list[tuple[str, str, list[Datum], str]] = [
    ("no data", "cross_entropy", [], r"data: .*at least one datum"),
    ("unknown loss", "gspo", [GOOD], r"loss_fn: .*cross_entropy.*'gspo'"),
    ("empty input", "cross_entropy", [Datum(model_input=[])], r"data\[0\]\.model_input: .*at least one token"),
    ("too long", "cross_entropy", [GOOD, _datum([1] * 2049)], r"data\[1\]\.model_input: has 2049 tokens.*at most 2048"),
    ("token", "cross_entropy", [_datum([1, 259])], r"data\[0\]\.model_input: token id 259 .*0 to 258"),
    ("negative token", "cross_entropy", [_datum([-1, 2])], r"data\[0\]\.model_input: token id -1 "),
    ("image", "cross_entropy", [IMAGE], r"data\[0\]\.model_input: .*images"),
    ("experts", "cross_entropy", [ROUTED], r"data\[0\]\.routed_experts_ref"),
    (
        "target",
        "cross_entropy",
        [_datum(target_tokens=[1, 300])],
        r"^data\[0\]\.loss_fn_inputs\['target_tokens'\]: 300 is neither -100 nor",
    ),
    ("target below", "cross_entropy", [_datum(target_tokens=[1, -1])], r"'target_tokens'\]: -1 is neither"),
    ("float targets", "cross_entropy", [_datum(target_tokens=[1.0, 2.0])], r"'target_tokens'\]: must be integers"),
    (
        "short targets",
        "cross_entropy",
        [_datum(target_tokens=[1])],
        r"'target_tokens'\]: must have the shape \[2\] or \[2, K\] for cross_entropy, .*; got \[1\]",
    ),
    (
        "K of 0",
        "cross_entropy",
        [_datum(target_tokens=_raw([], "int64", [2, 0]))],
        r"'target_tokens'\]: must have the shape",
    ),
    (
        "K in RL",
        "ppo",
        [_datum(target_tokens=[[1, 2], [3, 4]], **RL)],
        r"'target_tokens'\]: must have the shape \[2\] for ppo,",
    ),
    (
        "null target",
        "cross_entropy",
        [_datum(target_tokens=_raw([1, None], "int64", [2]))],
        r"does not fit its dtype int64",
    ),
    ("half a tensor", "cross_entropy", [_datum(target_tokens=_raw([1], "int64", [2]))], r"does not fit .*shape \[2\]"),
    (
        "different K",
        "cross_entropy",
        [_datum(target_tokens=[[1, 2], [3, 4]]), _datum(target_tokens=[1, 2])],
        r"data\[1\].*same rank",
    ),
    (
        "weights",
        "cross_entropy",
        [GOOD, _datum(target_tokens=[1, 2], weights=[1.0])],
        r"data\[1\]\.loss_fn_inputs\['weights'\]: .*\[2\]; got \[1\]",
    ),
    (
        "NaN weight",
        "cross_entropy",
        [_datum(target_tokens=[1, 2], weights=[1.0, math.nan])],
        r"'weights'\]: must be finite.*position 1",
    ),
    ("misspelt", "cross_entropy", [_datum(target_tokens=[1, 2], weight=[1.0, 1.0])], r"\['weight'\]: unknown"),
    (
        "no advantages",
        "ppo",
        [_datum(target_tokens=[1, 2], logprobs=[0.0, 0.0])],
        r"ppo needs .*missing \['advantages'\]",
    ),
    (
        "no logprobs",
        "cispo",
        [_datum(target_tokens=[1, 2], advantages=[0.0, 0.0])],
        r"cispo needs .*missing \['logprobs'\]",
    ),
    (
        "null logprob",
        "dro",
        [_datum(target_tokens=[1, 2], logprobs=_raw([None, 0.0], "float32", [2]), advantages=[1.0, 1.0])],
        r"'logprobs'\]: must be finite.*position 0",
    ),
    ("half a pair", "dpo", [_datum(target_tokens=[1, 2], ref_logprobs=[0.0, 0.0])], r"data: dpo needs .*pairs"),
    ("no reference", "dpo", [GOOD, GOOD], r"dpo needs .*missing \['ref_logprobs'\]"),
    ("no targets", "dpo", [_datum(ref_logprobs=[0.0, 0.0])] * 2, r"dpo needs .*missing \['target_tokens'\]"),
    ("half the advantages", "ppo", [_datum([1, 2, 3], logprobs=[0.0] * 3, advantages=[1.0] * 2)], r"got \[2\]"),
]


@pytest.mark.parametrize(("loss_fn", "data", "message"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_data(trainer: Trainer, loss_fn: str, data: list[Datum], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        trainer.forward(data, loss_fn, {}, backward=True)
    assert trainer.optim_step(AdamParams())["tokens"] == 0


@pytest.mark.parametrize(
    ("loss_fn", "config", "message"),
    [
        ("cross_entropy", {"beta": 0.1}, r"loss_fn_config\['beta'\]: unknown.*skip_token_normalization"),
        ("ppo", {"clip_low": 0.1}, r"loss_fn_config\['clip_low'\]: unknown.*clip_low_threshold"),
        ("ppo", {"clip_low_threshold": 1.3}, r"clip_low_threshold'\]: must not exceed"),
        ("ppo", {"clip_low_threshold": "low"}, r"clip_low_threshold'\]: must be a finite number.*'low'"),
        ("dro", {"beta": -1}, r"'beta'\]: must be a finite number of at least 0"),
        ("dro", {"beta": math.nan}, r"'beta'\]: must be a finite number"),
        ("dro", {"beta": True}, r"'beta'\]: must be a finite number"),
        ("dpo", {"label_smoothing": 1.5}, r"'label_smoothing'\]: must be a number from 0 to 1"),
        ("cross_entropy", {"skip_token_normalization": 1}, r"'skip_token_normalization'\]: must be true or false"),
    ],
)
def test_config(trainer: Trainer, loss_fn: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        trainer.forward([GOOD], loss_fn, config, backward=True)


@pytest.mark.parametrize("top_k", [-1, 21])
def test_top_k(trainer: Trainer, top_k: int) -> None:
    with pytest.raises(RefusedError, match="top_k_logprobs: must be between 0 and 20"):
        trainer.forward([GOOD], "cross_entropy", {}, backward=False, top_k=top_k)


def test_rank(engine: Engine) -> None:
    with pytest.raises(RefusedError, match="lora_rank: must be at least 1; got 0"):
        engine.trainer(0)


def test_adam(trainer: Trainer, tmp_path: Path) -> None:
    before = weights(trainer, tmp_path)
    with pytest.raises(RefusedError, match=r"adam_params: .*beta1"):
        trainer.optim_step(AdamParams(beta1=1.0))
    assert all(np.array_equal(part, before[name]) for name, part in weights(trainer, tmp_path).items())
