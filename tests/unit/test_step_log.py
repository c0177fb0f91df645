"""The row of a step: each number has one name."""

from __future__ import annotations

from loops_async import ForwardBackwardOutput, OptimStepResponse
from loops_async._training.step_log import row


def passed(**metrics: float) -> ForwardBackwardOutput:
    return ForwardBackwardOutput(loss=metrics["loss"], metrics={"loss:sum": metrics["loss"] * 4, **metrics})


def test_a_number_that_both_report_stands_there_once() -> None:
    step = OptimStepResponse(metrics={"step": 1.0, "learning_rate": 0.1, "lr": 0.1, "grad_norm": 2.0, "tokens": 8.0})
    metrics = {"loss": 1.0, "tokens": 8.0, "tokens:sum": 8.0, "entropy": 0.5}
    assert row([(passed(**metrics), 2)], step) == {
        "step": 1.0,
        "loss": 1.0,
        "tokens": 8.0,
        "learning_rate": 0.1,
        "grad_norm": 2.0,
        "forward_backward/loss:sum": 4.0,
        "forward_backward/entropy": 0.5,
    }


def test_the_tokens_of_several_passes_are_added_up() -> None:
    passes = [(passed(**{"loss": 1.0, "tokens": n, "tokens:sum": n}), 1) for n in (3.0, 4.0)]
    assert row(passes, OptimStepResponse())["tokens"] == 7.0


def test_a_rate_that_only_has_its_short_name_gets_the_long_one() -> None:
    assert row([], OptimStepResponse(metrics={"lr": 0.1})) == {"learning_rate": 0.1}
