"""Which failures of rollouts are repeated, and when there are too many."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from loops_async import (
    ConnectError,
    FailurePolicy,
    InputError,
    NotReadyError,
    OperationTimeoutError,
    RateLimitError,
    RolloutError,
)
from loops_async._rollouts.failures import Breaker


class OddError(Exception):
    """One of the user's own."""


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (ConnectError("broken"), True),
        (NotReadyError("not yet"), True),
        (OperationTimeoutError("late", operation_id="1", operation="x", run_id=None), True),
        (OSError(28, "no space"), True),
        (TimeoutError(), True),
        (asyncio.CancelledError(), True),
        (OddError(), False),
        (InputError("prompt", "is wrong"), False),
        (ZeroDivisionError(), False),
        (AssertionError(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_pass_is_repeated(error: BaseException, *, may_pass: bool) -> None:
    assert FailurePolicy().may_pass(error) is may_pass


def test_the_user_says_what_else_may_pass() -> None:
    assert FailurePolicy(retry_on=(OddError,)).may_pass(OddError())


def test_pauses_grow_and_heed_the_service() -> None:
    policy = FailurePolicy()
    for attempt, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (10, 30.0)):
        assert longest / 2 <= policy.pause_before(attempt, OSError()) <= longest
    assert policy.pause_before(1, RateLimitError("slow down", status=429, retry_after=17.0)) == 17.0


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"retries": -1}, "retries"),
        ({"min_group_size": 0}, "min_group_size"),
        ({"max_failures_in_a_row": 0}, "max_failures_in_a_row"),
        ({"max_failure_share": 0.0}, "max_failure_share"),
        ({"max_failure_share": 1.1}, "max_failure_share"),
        ({"window": 0}, "window"),
        ({"max_drops_in_a_row": 0}, "max_drops_in_a_row"),
        ({"retries": 1.5}, "retries"),
        ({"retry_on": OddError}, "retry_on"),
        ({"retry_on": (OddError, "OSError")}, "retry_on[1]"),
    ],
    ids=repr,
)
def test_policies_that_are_refused(arguments: dict[str, Any], path: str) -> None:
    with pytest.raises(InputError) as refused:
        FailurePolicy(**arguments)
    assert refused.value.path == path


# --- the breaker ---


def failures(breaker: Breaker, count: int, error: Exception | None = None) -> None:
    for _ in range(count):
        breaker.failed(error or OddError("again"))


def test_failures_in_a_row() -> None:
    breaker = Breaker(FailurePolicy(max_failures_in_a_row=3))
    failures(breaker, 2)
    breaker.accepted()
    failures(breaker, 2)
    breaker.dropped(is_constant=True)
    failures(breaker, 2)
    assert breaker.error is None
    breaker.failed(last := ValueError("the last one"))
    assert isinstance(breaker.error, RolloutError)
    assert breaker.error.failures == {"OddError": 6, "ValueError": 1}
    assert breaker.error.__cause__ is last
    assert str(breaker.error) == (
        "3 groups failed in a row, see FailurePolicy.max_failures_in_a_row. Failed groups so far: 6 OddError, 1 "
        "ValueError. The last error: ValueError: the last one"
    )


def test_the_share_of_the_last_groups() -> None:
    breaker = Breaker(FailurePolicy(max_failure_share=0.5, window=4))
    breaker.accepted()
    failures(breaker, 2)
    assert breaker.error is None, "a share of two or three groups says little"
    breaker.accepted()
    assert breaker.error is not None
    assert "2 of the last 4 groups failed" in str(breaker.error)
    breaker.accepted()
    breaker.accepted()
    assert breaker.error is None, "what is long ago does not count"


def test_drops_in_a_row() -> None:
    breaker = Breaker(FailurePolicy(max_drops_in_a_row=3))
    breaker.dropped(is_constant=True)
    breaker.dropped(is_constant=True)
    breaker.accepted()
    breaker.dropped(is_constant=True)
    breaker.dropped(is_constant=True)
    breaker.failed(OddError())
    assert breaker.error is None
    breaker.dropped(is_constant=True)
    assert breaker.error is not None
    assert "3 groups were dropped in a row" in str(breaker.error)


def test_a_breaker_that_is_open_without_a_failure_has_no_cause() -> None:
    breaker = Breaker(FailurePolicy(max_drops_in_a_row=1))
    breaker.dropped(is_constant=True)
    assert breaker.error is not None
    assert (breaker.error.failures, breaker.error.__cause__) == ({}, None)
