"""The client's sum of a loss is that of the engine, for all losses, settings, shapes and masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from loops_async import InputError, loss_sum
from loops_async.protocol import IGNORED_TARGET, LOSSES
from loops_async.types import Datum
from loops_local.engine.base import Trainer

CHOICES = {
    "clip_low_threshold": st.floats(0.1, 0.9),
    "clip_high_threshold": st.floats(1.0, 3.0),
    "beta": st.floats(0.0, 2.0),
    "label_smoothing": st.floats(0.0, 1.0),
    "dppo_mask_high": st.floats(0.0, 0.5),
    "dppo_mask_low": st.floats(0.0, 0.5),
    "adv_tau": st.floats(0.0, 2.0),
    "kl_tau": st.floats(0.0, 2.0),
    "score_all_targets": st.booleans(),
    "skip_token_normalization": st.booleans(),
}
TOKENS = st.integers(0, 255)
LOGPROBS = st.floats(-9.0, 0.0, width=32)
FACTORS = st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-3.0, 3.0, width=32)


@st.composite
def passes(draw: st.DrawFn) -> tuple[list[Datum], str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(LOSSES)))
    rule = LOSSES[name]
    width = draw(st.integers(0, 2)) if rule.target_rank == 2 else 0
    count = draw(st.integers(1, 2)) * rule.group
    with_targets = "target_tokens" in rule.required or width > 0 or draw(st.booleans())
    data = [draw(datums(name, width, with_targets=with_targets)) for _ in range(count)]
    config = draw(st.fixed_dictionaries({}, optional={key: CHOICES[key] for key in rule.settings}))
    return data, name, config


@st.composite
def datums(draw: st.DrawFn, name: str, width: int, *, with_targets: bool) -> Datum:
    rule, n = LOSSES[name], draw(st.integers(2, 5))

    def tensor(numbers: st.SearchStrategy[Any]) -> Any:
        row = st.lists(numbers, min_size=width, max_size=width) if width else numbers
        return draw(st.lists(row, min_size=n, max_size=n))

    inputs: dict[str, Any] = {}
    if with_targets:
        inputs["target_tokens"] = tensor(TOKENS | st.just(IGNORED_TARGET))
    if "weights" in rule.inputs and draw(st.booleans()):
        inputs["weights"] = tensor(FACTORS)
    for theirs in {"logprobs", "ref_logprobs"} & set(rule.inputs):
        inputs[theirs] = tensor(LOGPROBS)
    if "advantages" in rule.inputs:
        inputs["advantages"] = [draw(FACTORS)] if draw(st.booleans()) else tensor(FACTORS)
    return Datum(model_input=draw(st.lists(TOKENS, min_size=n, max_size=n)), loss_fn_inputs=inputs)


@pytest.fixture(scope="module")
def one_trainer(engine: Any) -> Trainer:
    trainer: Trainer = engine.trainer(4, seed=0)
    return trainer


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(made=passes())
def test_it_is_the_engines(one_trainer: Trainer, made: tuple[list[Datum], Any, dict[str, Any]]) -> None:
    data, name, config = made
    output = one_trainer.forward(data, name, config, backward=False)
    theirs = output.metrics["loss:sum"]
    assert loss_sum(data, output, name, config) == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_a_ratio_that_is_too_large_for_a_float_is_infinite(one_trainer: Trainer) -> None:
    datum = Datum(model_input=[1, 2], loss_fn_inputs={"logprobs": [-2000.0, 0.0], "advantages": [-1.0, 0.0]})
    output = one_trainer.forward([datum], "importance_sampling", {}, backward=False)
    assert output.metrics["loss:sum"] == math.inf == loss_sum([datum], output, "importance_sampling")


def test_the_output_must_be_that_of_the_data(one_trainer: Trainer) -> None:
    short, long = Datum(model_input=[1, 2]), Datum(model_input=[1, 2, 3])
    output = one_trainer.forward([long], "cross_entropy", {}, backward=False)
    with pytest.raises(InputError, match=r"output.loss_fn_outputs: has 1 outputs, and data has 2 datums"):
        loss_sum([short, long], output)
    with pytest.raises(InputError, match=r"outputs\[0\]\['logprobs'\]: must have one number for each of the 2 targets"):
        loss_sum([short], output)
    with pytest.raises(InputError, match="must have one number"):
        loss_sum([long], replace(output, loss_fn_outputs=[{}]))
