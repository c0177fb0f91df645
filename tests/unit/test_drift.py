"""The sampler's logprobs against the trainer's."""

from __future__ import annotations

import logging
import math
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import loops_sync
from loops_async import (
    Datum,
    ForwardBackwardOutput,
    InputError,
    TensorData,
    loops_compute_kl_sample_train,
    loops_log_kl_sample_train,
    top_divergent_tokens,
)

PREFIX = "optim/train-sample-div/"


def example(sample: list[float], **inputs: Any) -> Datum:
    tokens = list(range(10, 10 + len(sample)))
    targets = [*tokens[1:], 99]
    return Datum(model_input=tokens, loss_fn_inputs={"target_tokens": targets, "logprobs": sample, **inputs})


DATA = [
    example([0.0, -1.0, -2.0, -3.0], mask=[0, 1, 1, 1], advantages=[1.0, 1.0, -1.0, 0.0]),
    example([-0.5, math.nan, -6.0], mask=[1, 1, 1], advantages=[2.0, 2.0, 2.0]),
]
TRAIN = [[-9.0, -1.5, -1.0, -9.0], TensorData(data=[-0.5, -0.5, -1.5], dtype="float32", shape=[3])]
# What counts: masked in, with an advantage, and finite.
SAMPLED = np.array([-1.0, -2.0, -0.5, -6.0])
TRAINED = np.array([-1.5, -1.0, -0.5, -1.5])


def test_the_metrics_are_those_of_the_tokens_that_count() -> None:
    d = TRAINED - SAMPLED
    w = np.exp(d)
    found = loops_compute_kl_sample_train(DATA, TRAIN)
    expected = {
        "kl_sample_train_v1_loops": np.mean(SAMPLED - TRAINED),
        "kl_sample_train_v2_loops": np.mean((SAMPLED - TRAINED) ** 2) / 2,
        "kl_sample_train_k3": np.mean(w - 1 - d),
        "is_ratio_mean": np.mean(w),
        "ess_fraction": np.sum(w) ** 2 / (4 * np.sum(w**2)),
        "diff_mean": 1.25,
        "diff_abs_p50": 0.75,
        "diff_abs_p90": 1.0 + 0.7 * 3.5,
        "diff_abs_p99": 1.0 + 0.97 * 3.5,
        "diff_abs_max": 4.5,
        "frac_abs_gt_1": 0.25,
        "frac_abs_gt_2": 0.25,
        "frac_abs_gt_4": 0.25,
        "entropy": 9.5 / 4,
        "n_action_tokens": 4.0,
    }
    assert found == pytest.approx({PREFIX + name: value for name, value in expected.items()})
    assert all(type(value) is float for value in found.values())


def test_equal_logprobs_mean_no_drift() -> None:
    data = [example([-1.0, -2.0], mask=[1, 1])]
    found = loops_compute_kl_sample_train(data, [[-1.0, -2.0]], prefix="")
    assert found["is_ratio_mean"] == found["ess_fraction"] == 1.0
    assert found["kl_sample_train_k3"] == found["diff_abs_max"] == 0.0


def test_a_single_advantage_counts_for_the_whole_row() -> None:
    data = [example([-1.0, -2.0], advantages=[1.0]), example([-1.0, -2.0], advantages=[0.0])]
    assert loops_compute_kl_sample_train(data, [[-1.0, -2.0]] * 2, prefix="")["n_action_tokens"] == 2.0


def test_without_tokens_there_is_only_their_number() -> None:
    assert loops_compute_kl_sample_train([example([-1.0], mask=[0])], [[-1.0]]) == {f"{PREFIX}n_action_tokens": 0.0}
    assert loops_compute_kl_sample_train([], []) == {f"{PREFIX}n_action_tokens": 0.0}


def test_a_huge_ratio_stays_finite() -> None:
    found = loops_compute_kl_sample_train([example([-1000.0], mask=[1])], [[-1.0]], prefix="")
    assert found["is_ratio_mean"] == pytest.approx(math.exp(80))
    assert math.isfinite(found["ess_fraction"])


def test_logprobs_that_are_all_zero_are_told(caplog: pytest.LogCaptureFixture) -> None:
    loops_compute_kl_sample_train([example([-1.0], mask=[1])], [[0.0]])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize(
    ("data", "train", "problem"),
    [
        (DATA, TRAIN[:1], "one entry for each of 2"),
        ([example([-1.0, -2.0], mask=[1, 1])], [[-1.0]], r"training_logprobs\[0\]: has 1 entries"),
        ([example([-1.0, -2.0], mask=[1])], [[-1.0, -2.0]], r"\['mask'\]: has 1 entries"),
        ([example([-1.0])], [[-1.0]], "mask or advantages"),
        ([Datum(model_input=[1], loss_fn_inputs={"mask": [1]})], [[-1.0]], "sampler's logprobs"),
    ],
)
def test_what_does_not_fit_is_named(data: list[Datum], train: list[Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        loops_compute_kl_sample_train(data, train)


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{token}>" for token in ids)


def test_the_worst_tokens_come_first_with_their_surroundings() -> None:
    first, second, *rest = top_divergent_tokens(DATA, TRAIN, top_n=3, tokenizer=Tokenizer(), context_before=2)
    assert first == {
        "rank": 1,
        "datum": 1,
        "position": 3,
        "token": "<99>",
        "logp_sampler": -6.0,
        "logp_trainer": -1.5,
        "diff": 4.5,
        "is_weight": pytest.approx(math.exp(4.5)),
        "context": "<11><12>⟦<99>⟧",
    }
    assert (second["datum"], second["position"], second["context"]) == (0, 3, "<11><12>⟦<13>⟧")
    assert len(rest) == 1
    assert top_divergent_tokens(DATA, TRAIN, top_n=1)[0]["context"] == "10 11 12⟦99⟧"


class Run:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.logged.append((step, metrics))


OUTPUT = ForwardBackwardOutput(loss_fn_outputs=[{"logprobs": TensorData.of(one)} for one in TRAIN])


def test_without_a_run_there_are_numbers_only() -> None:
    assert loops_log_kl_sample_train(None, 3, DATA, OUTPUT) == loops_compute_kl_sample_train(DATA, TRAIN)


def test_a_run_gets_numbers_also_where_wandb_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = Run()
    metrics = loops_log_kl_sample_train(run, 3, DATA, training_logprobs=TRAIN)
    assert run.logged == [(3, metrics)]
    assert metrics == loops_compute_kl_sample_train(DATA, TRAIN)


def test_a_run_gets_a_histogram_and_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb: Any = ModuleType("wandb")
    wandb.Histogram = lambda values: ("histogram", list(values))
    wandb.Table = lambda columns, data: ("table", columns, data)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = Run()
    loops_log_kl_sample_train(run, 3, DATA, OUTPUT, max_histogram_tokens=2, top_n=1, prefix="p/")
    (_, metrics), *_ = run.logged
    assert metrics["p/per_token_diff_hist"] == ("histogram", [-0.5, 0.0])
    kind, columns, rows = metrics["p/worst_tokens"]
    assert (kind, columns[:3], rows[0][:3]) == ("table", ["rank", "datum", "position"], [1, 1, 3])


def test_one_of_the_two_sources_is_needed() -> None:
    with pytest.raises(InputError, match="training_logprobs"):
        loops_log_kl_sample_train(None, 0, DATA)


def test_both_colours_have_them() -> None:
    assert loops_sync.top_divergent_tokens is top_divergent_tokens
