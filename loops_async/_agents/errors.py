"""What an agent is told when a call cannot be answered: an error in the terms of HTTP, still without a form."""

from __future__ import annotations

import re
from math import ceil
from typing import Final

from ..errors import ApiError, InputError, LoopsError, NotReadyError, RateLimitError, SampleTimeoutError

__all__ = ["RefusedCall", "bad_request", "refusal_of"]

TOO_LONG: Final = re.compile(
    r"longest sequence|context.?length|max_(model|seq)_len|maximum.{0,20}(length|context)|too long", re.IGNORECASE
)
"""How samplers say that a prompt is too long: engines have no code for it in common."""


class RefusedCall(Exception):  # noqa: N818 - what is refused is the call; it becomes an answer, not a failure
    """A call that is answered with an error. `status`, `code` and `param` are those of the answer."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        may_retry: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.may_retry = may_retry
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """What tells the SDKs whether to try again."""
        headers = {"x-should-retry": "true" if self.may_retry else "false"}
        if self.retry_after is not None:
            headers["retry-after"] = str(ceil(self.retry_after))
        return headers


def bad_request(param: str | None, message: str, code: str = "invalid_value") -> RefusedCall:
    """Return the refusal of a request that is wrong, or that is not served here."""
    return RefusedCall(400, code, message if param is None else f"{param}: {message}", param=param)


def refusal_of(error: LoopsError) -> RefusedCall:
    """Return what an agent is told of an error of the sampler."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, InputError):
        return bad_request(error.path.rpartition(".")[2], str(error).partition(": ")[2])
    if isinstance(error, SampleTimeoutError):
        return RefusedCall(504, "sample_timeout", message)
    if isinstance(error, RateLimitError):
        pause = 1.0 if error.retry_after is None else error.retry_after
        return RefusedCall(429, "rate_limit_exceeded", message, may_retry=True, retry_after=pause)
    if isinstance(error, ApiError) and error.status in (400, 413, 422) and TOO_LONG.search(str(error)):
        return RefusedCall(400, "context_length_exceeded", message, param="messages")
    if error.retryable or isinstance(error, NotReadyError):
        return RefusedCall(503, "sampler_unavailable", message, may_retry=True)
    return RefusedCall(502, "sampler_failed", message)
