"""What an agent is told when the sampler fails."""

from __future__ import annotations

import pytest

from loops_async._agents.errors import refusal_of
from loops_async.errors import (
    AuthenticationError,
    BadRequestError,
    ConnectError,
    InputError,
    LoopsError,
    LostAnswerError,
    NotReadyError,
    RateLimitError,
    SamplerTerminatedError,
    SampleTimeoutError,
    ServerError,
)


@pytest.mark.parametrize(
    ("error", "status", "code", "may_retry"),
    [
        (InputError("sampling_params.stop", "must not"), 400, "invalid_value", False),
        (BadRequestError("the longest sequence is 2048", status=400), 400, "context_length_exceeded", False),
        (BadRequestError("maximum context length is 8192", status=400), 400, "context_length_exceeded", False),
        (BadRequestError("no such thing", status=422), 502, "sampler_failed", False),
        (AuthenticationError("our own key", status=401), 502, "sampler_failed", False),
        (RateLimitError("slow down", status=429, retry_after=1.2), 429, "rate_limit_exceeded", True),
        (RateLimitError("slow down", status=429), 429, "rate_limit_exceeded", True),
        (ServerError("busy", status=503), 503, "sampler_unavailable", True),
        (ServerError("broken", status=500), 502, "sampler_failed", False),
        (NotReadyError("not yet"), 503, "sampler_unavailable", True),
        (ConnectError("gone"), 503, "sampler_unavailable", True),
        (LostAnswerError("lost"), 502, "sampler_failed", False),
        (SampleTimeoutError("late"), 504, "sample_timeout", False),
        (SamplerTerminatedError("ended", status="FAILED"), 502, "sampler_failed", False),
    ],
)
def test_errors_of_the_sampler_keep_their_meaning(error: LoopsError, status: int, code: str, may_retry: bool) -> None:
    refused = refusal_of(error)
    assert (refused.status, refused.code, refused.may_retry) == (status, code, may_retry)
    assert refused.headers["x-should-retry"] == str(may_retry).lower()
    assert ("retry-after" in refused.headers) is (status == 429)


def test_a_pause_is_whole_seconds_and_not_too_short() -> None:
    assert refusal_of(RateLimitError("", status=429, retry_after=1.2)).headers["retry-after"] == "2"
