"""What both engines refuse to train on, in the same words: the text names the datum, the field and the rule."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import aiohttp
import pytest

from loops_async.protocol import ForwardBody, encode
from loops_async.types import Datum, TensorData
from loops_async.types.inputs import ExternalRef
from tests.service.api import Api

Case: TypeAlias = "tuple[list[Datum], str, dict[str, Any]]"

MODELS = {"echo": "some/model", "tiny": "tiny"}


@pytest.fixture(params=["echo", pytest.param("tiny", marks=pytest.mark.torch)])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def api(engine: str, request: pytest.FixtureRequest, http: aiohttp.ClientSession) -> Api:
    return Api(request.getfixturevalue("echo_service" if engine == "echo" else engine), http)


@pytest.fixture
async def run(api: Api, engine: str) -> AsyncIterator[dict[str, Any]]:
    run = await api.run(base_model=MODELS[engine], lora_rank=2)
    yield run
    await api.post(f"/v1/loops/runs/{run['id']}/deactivate")


def _datum(tokens: list[int] | None = None, **inputs: Any) -> Datum:
    return Datum(model_input=tokens or [1, 2], loss_fn_inputs=inputs)


def _raw(data: list[Any], dtype: str, shape: list[int]) -> TensorData:
    return TensorData(data=data, dtype=dtype, shape=shape)


def _batch(*data: Datum, loss: str = "cross_entropy", **config: Any) -> Case:
    return list(data), loss, config


def _body(case: Case) -> dict[str, Any]:
    """Return a body as it is sent, so with null in place of NaN."""
    data, loss_fn, config = case
    body: dict[str, Any] = json.loads(encode(ForwardBody(data=data, loss_fn=loss_fn, loss_fn_config=config)))
    return body


TARGETS = {"target_tokens": [1, 2]}
GOOD = _datum(**TARGETS)
RL = {"logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]}
ROUTED = Datum(model_input=[1], routed_experts_ref=ExternalRef(uri="x", version=1))
OF_TWO = [[1, 2], [3, 4]]
PAIR = _datum(ref_logprobs=[-1.0, -1.0], **TARGETS)
HUGE = 10**400
"""An integer that no float can express."""

REFUSED: dict[str, tuple[Case, str]] = {
    "experts": (_batch(ROUTED), r"data\[0\]\.routed_experts_ref: "),
    "negative token": (_batch(_datum([-1, 2])), r"data\[0\]\.model_input: token id.* -1\b"),
    "token beyond int64": (_batch(_datum([1, 2**63])), r"data\[0\]\.model_input: token id.* 9223372036854775808"),
    "negative target": (_batch(_datum(target_tokens=[1, -1])), r"'target_tokens'\]: -1 is neither -100 nor a token id"),
    "target beyond int64": (
        _batch(_datum(target_tokens=[1, 2**63])),
        r"'target_tokens'\]: does not fit its dtype int64",
    ),
    "float targets": (_batch(_datum(target_tokens=[1.0, 2.0])), r"'target_tokens'\]: must be integers"),
    "short targets": (
        _batch(_datum(target_tokens=[1])),
        r"'target_tokens'\]: must have the shape \[2\] or \[2, K\] for cross_entropy, .*; got \[1\]",
    ),
    "targets without a shape": (_batch(_datum([1], target_tokens=_raw([1], "int64", []))), r"\[1, K\].*; got \[\]"),
    "K of 0": (_batch(_datum(target_tokens=_raw([], "int64", [2, 0]))), r"'target_tokens'\]: must have the shape"),
    "K of -1": (_batch(_datum(target_tokens=_raw([1, 2], "int64", [2, -1]))), r"does not fit .*shape \[2, -1\]"),
    "K in RL": (
        _batch(_datum(target_tokens=OF_TWO, **RL), loss="ppo"),
        r"'target_tokens'\]: must have the shape \[2\] for ppo,",
    ),
    "rank 3": (_batch(_datum(target_tokens=_raw([1, 2], "int64", [2, 1, 1]))), r"\[2, K\].*; got \[2, 1, 1\]"),
    "null target": (_batch(_datum(target_tokens=_raw([1, None], "int64", [2]))), r"does not fit its dtype int64"),
    "half a tensor": (_batch(_datum(target_tokens=_raw([1], "int64", [2]))), r"does not fit .*shape \[2\]"),
    "half the weights": (
        _batch(_datum(weights=_raw([1.0], "float32", [2]), **TARGETS)),
        r"'weights'\]: does not fit .*shape \[2\]",
    ),
    "different K": (_batch(_datum(target_tokens=OF_TWO), GOOD), r"data\[1\].*same rank"),
    "weights": (
        _batch(GOOD, _datum(weights=[1.0], **TARGETS)),
        r"data\[1\]\.loss_fn_inputs\['weights'\]: .*\[2\]; got \[1\]",
    ),
    "NaN weight": (_batch(_datum(weights=[1.0, math.nan], **TARGETS)), r"'weights'\]: must be finite.*position 1"),
    "NaN weight of the second K": (
        _batch(_datum(target_tokens=OF_TWO, weights=[[1.0, 1.0], [1.0, math.nan]])),
        r"'weights'\]: must be finite.*position 1",
    ),
    "null weight": (_batch(_datum(weights=_raw([None, 1], "int64", [2]))), r"'weights'\]: must be finite.*position 0"),
    "weight beyond float32": (
        _batch(_datum(weights=[1.0, 1e39], **TARGETS)),
        r"'weights'\]: must be finite.*position 1",
    ),
    "weight beyond floats": (
        _batch(_datum(weights=_raw([1, HUGE], "float32", [2]))),
        r"'weights'\]: does not fit its dtype float32",
    ),
    "misspelt": (_batch(_datum(weight=[1.0, 1.0], **TARGETS)), r"\['weight'\]: unknown; known are advantages, "),
    "no advantages": (
        _batch(_datum(logprobs=[0.0, 0.0], **TARGETS), loss="ppo"),
        r"ppo needs .*missing \['advantages'\]",
    ),
    "no logprobs": (
        _batch(_datum(advantages=[0.0, 0.0], **TARGETS), loss="cispo"),
        r"cispo needs .*missing \['logprobs'\]",
    ),
    "null logprob": (
        _batch(_datum(logprobs=[math.nan, 0.0], advantages=[1.0, 1.0]), loss="dro"),
        r"'logprobs'\]: must be finite.*position 0",
    ),
    "null advantage": (
        _batch(_datum(logprobs=[0.0, 0.0], advantages=[math.nan]), loss="ppo"),
        r"'advantages'\]: must be finite.*position 0",
    ),
    "one logprob": (_batch(_datum(logprobs=[0.0], advantages=[1.0]), loss="ppo"), r"'logprobs'\]: .*got \[1\]"),
    "half the advantages": (
        _batch(_datum([1, 2, 3], logprobs=[0.0] * 3, advantages=[1.0] * 2), loss="ppo"),
        r"'advantages'\]: .*got \[2\]",
    ),
    "half a pair": (_batch(PAIR, loss="dpo"), r"data: dpo needs .*pairs"),
    "no reference": (_batch(GOOD, GOOD, loss="dpo"), r"dpo needs .*missing \['ref_logprobs'\]"),
    "no targets": (
        _batch(*[_datum(ref_logprobs=[0.0, 0.0])] * 2, loss="dpo"),
        r"dpo needs .*missing \['target_tokens'\]",
    ),
    "foreign setting": (_batch(GOOD, beta=0.1), r"loss_fn_config\['beta'\]: unknown.*skip_token_normalization"),
    "unknown setting": (
        _batch(_datum(**RL), loss="ppo", clip_low=0.1),
        r"loss_fn_config\['clip_low'\]: unknown.*clip_low_threshold",
    ),
    "low above high": (
        _batch(_datum(**RL), loss="ppo", clip_low_threshold=1.3),
        r"clip_low_threshold'\]: must not exceed",
    ),
    "text": (
        _batch(_datum(**RL), loss="ppo", clip_low_threshold="low"),
        r"clip_low_threshold'\]: must be a finite number.*'low'",
    ),
    "below 0": (_batch(_datum(**RL), loss="dro", beta=-1), r"'beta'\]: must be a finite number of at least 0"),
    "null": (_batch(_datum(**RL), loss="dro", beta=None), r"'beta'\]: must be a finite number"),
    "true": (_batch(_datum(**RL), loss="dro", beta=True), r"'beta'\]: must be a finite number"),
    "above 1": (
        _batch(PAIR, PAIR, loss="dpo", label_smoothing=1.5),
        r"'label_smoothing'\]: must be a number from 0 to 1",
    ),
    "1": (_batch(GOOD, skip_token_normalization=1), r"'skip_token_normalization'\]: must be true or false"),
}

TRAINED: dict[str, Case] = {
    "nothing but tokens": _batch(_datum()),
    "several targets": _batch(_datum(target_tokens=OF_TWO, weights=[[1.0, 0.0], [0.5, -1.0]])),
    "no target": _batch(_datum(target_tokens=[-100, -100])),
    "inputs of other losses, whatever they are": _batch(_datum(weights=[1.0, 0.0], logprobs=[0.5] * 3, mask=[1.0])),
    "one advantage": _batch(_datum(logprobs=[-1.0, -1.0], advantages=[1.0]), loss="ppo"),
    "no logprob where there is no advantage": _batch(
        _datum(logprobs=[math.nan, -1.0], advantages=[0.0, 1.0], **TARGETS), loss="cispo"
    ),
    "a large logprob where there is no advantage": _batch(
        _datum(logprobs=[-1e300, -1.0], advantages=[0.0, 1.0], **TARGETS), loss="dro"
    ),
    "no weight where there is no target": _batch(_datum(target_tokens=[-100, 2], weights=[math.nan, 1.0])),
    "no weight after the last token": _batch(_datum(weights=[1.0, math.nan])),
    "pairs": _batch(PAIR, PAIR, loss="dpo", label_smoothing=1.0),
    "whole numbers": _batch(_datum(weights=[1, 0], **TARGETS)),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_a_loss_cannot_read_is_refused_and_changes_nothing(api: Api, run: dict[str, Any], name: str) -> None:
    case, message = REFUSED[name]
    error = await api.refused(run, "forward_backward", _body(case))
    assert error.startswith("ValueError: ")
    assert re.search(message, error), error
    assert (await api.operate(run, "optim_step", {"adam_params": {}}))["metrics"]["backward_passes"] == 0


@pytest.mark.parametrize("name", TRAINED)
async def test_what_is_only_unusual_is_trained(api: Api, run: dict[str, Any], name: str) -> None:
    await api.operate(run, "forward_backward", _body(TRAINED[name]))
    assert (await api.operate(run, "optim_step", {"adam_params": {}}))["metrics"]["backward_passes"] == 1


async def test_one_step_does_not_mix_normalised_gradients_with_others(api: Api, run: dict[str, Any]) -> None:
    plain, skipping = _body(_batch(GOOD)), _body(_batch(GOOD, skip_token_normalization=True))
    for first, second in ((plain, skipping), (skipping, plain)):
        await api.operate(run, "forward_backward", first)
        error = await api.refused(run, "forward_backward", second)
        assert "loss_fn_config['skip_token_normalization']: must be the same in all calls before" in error
        await api.operate(run, "forward", second)
        assert (await api.operate(run, "optim_step", {"adam_params": {}}))["metrics"]["backward_passes"] == 1
