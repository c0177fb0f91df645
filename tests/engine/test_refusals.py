"""What a trainer refuses, and that it can compute what `check_batch` lets pass.

What `check_batch` refuses is in `tests/service/test_training_data.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from loops_async.errors import InputError
from loops_async.protocol import LOSSES, TARGET_TOKENS
from loops_async.types import AdamParams, Datum, ImageChunk, ModelInput, TensorData
from loops_local.engine.base import Engine, RefusedError, Trainer
from loops_local.engine.checks import check_batch
from loops_local.engine.echo import EchoTrainer

from .tools import text, weights

GOOD = text("a", "b")
IMAGE = Datum(model_input=ModelInput([ImageChunk(data=b"", format="png", expected_tokens=2)]))


def _datum(tokens: list[int] | None = None, **inputs: Any) -> Datum:
    return Datum(model_input=tokens or [1, 2], loss_fn_inputs=inputs)


CASES: list[tuple[str, list[Datum], str]] = [
    ("too long", [GOOD, _datum([1] * 2049)], r"data\[1\]\.model_input: has 2049 tokens.*at most 2048"),
    ("token", [_datum([1, 259])], r"data\[0\]\.model_input: token id 259 .*0 to 258"),
    ("negative token", [_datum([-1, 2])], r"data\[0\]\.model_input: token id -1 "),
    ("image", [IMAGE], r"data\[0\]\.model_input: .*images"),
    (
        "target",
        [_datum(target_tokens=[1, 300])],
        r"^data\[0\]\.loss_fn_inputs\['target_tokens'\]: 300 is neither -100 nor",
    ),
    ("target below", [_datum(target_tokens=[1, -1])], r"'target_tokens'\]: -1 is neither"),
]


@pytest.mark.parametrize(("data", "message"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_data(trainer: Trainer, data: list[Datum], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        trainer.forward(data, "cross_entropy", {}, backward=True)
    assert trainer.optim_step(AdamParams())["tokens"] == 0


@st.composite
def batches(draw: st.DrawFn) -> tuple[str, list[Datum]]:
    """Return a loss and a pair of datums, in whose inputs a number may be odd."""
    loss_fn = draw(st.sampled_from(sorted(LOSSES)))
    rule = LOSSES[loss_fn]
    shape = draw(st.sampled_from([[2], [2, 1], [2, 2]])) if rule.target_rank == 2 else [2]
    names = [*rule.required, *(name for name in rule.optional if draw(st.booleans()))]
    return loss_fn, [_datum(**{name: draw(_tensors(name, shape)) for name in names}) for _ in range(2)]


def _tensors(name: str, shape: list[int]) -> st.SearchStrategy[TensorData]:
    usual, odd = ([0, 7, -100], [None, 2**63]) if name == TARGET_TOKENS else ([0.0, 0.5, -1.0], [None, 1e39, 10**400])
    number = st.sampled_from(usual * 8 + odd)
    numbers = st.lists(number, min_size=math.prod(shape), max_size=math.prod(shape))
    dtype = "int64" if name == TARGET_TOKENS else "float32"
    return numbers.map(lambda data: TensorData(data=data, dtype=dtype, shape=shape))


# The trainer may be shared by all examples, since a forward pass changes nothing.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches())
def test_engines_compute_what_passes(trainer: Trainer, batch: tuple[str, list[Datum]]) -> None:
    loss_fn, data = batch
    try:
        check_batch(data, loss_fn, {})
    except InputError:
        event("refused")
        return
    outputs = [each.forward(data, loss_fn, {}, backward=False) for each in (EchoTrainer(4), trainer)]
    echo, torch = ([scores["logprobs"].shape for scores in output.loss_fn_outputs] for output in outputs)
    assert echo == torch


def test_rank(engine: Engine) -> None:
    with pytest.raises(RefusedError, match="lora_rank: must be at least 1; got 0"):
        engine.trainer(0)


def test_adam(trainer: Trainer, tmp_path: Path) -> None:
    before = weights(trainer, tmp_path)
    with pytest.raises(RefusedError, match=r"adam_params: .*beta1"):
        trainer.optim_step(AdamParams(beta1=1.0))
    assert all(np.array_equal(part, before[name]) for name, part in weights(trainer, tmp_path).items())
