"""A sampling request, from the checked job to the result of its future."""

from __future__ import annotations

import random
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec

from loops_async.protocol import MAX_TOP_K_LOGPROBS
from loops_async.types import SamplingParams

from ..base import Completion, RefusedError, SampleJob, SampleOutcome, fits
from .adapter import LoraAdapter
from .examples import check_tokens
from .models import Base

__all__ = ["Request", "Row"]

DEFAULT_MAX_TOKENS = 512
"""The limit of a completion's tokens if `max_tokens` is not given; lower near the end of the model's context."""

OPEN_TOKENS = 4
"""The last tokens, whose text may change with the next one: a character has up to four bytes, each a token."""


@dataclass(eq=False, kw_only=True)
class Request:
    """`completions` are by sample index; the future gets its result when all `num_samples` are finished."""

    prompt: list[int]
    num_samples: int
    params: SamplingParams
    max_tokens: int
    stop_strings: list[str]
    stop_tokens: frozenset[int]
    adapter: LoraAdapter | None
    wanted_prompt_logprobs: int | None
    future: Future[SampleOutcome] = field(default_factory=Future)
    arrival: int = 0
    started: int = 0
    prompt_logprobs: list[dict[int, float] | None] | None = None
    completions: dict[int, Completion] = field(default_factory=dict)

    @classmethod
    def of(cls, job: SampleJob, base: Base) -> Request:
        """Check `job` and apply the defaults."""
        params = _valid(job.params)
        prompt = check_tokens(job.prompt, base.info, "prompt")
        if job.num_samples < 1:
            raise RefusedError(f"num_samples: must be at least 1; got {job.num_samples}")
        if job.prompt_logprobs is not None and not 0 <= job.prompt_logprobs <= MAX_TOP_K_LOGPROBS:
            raise RefusedError(
                f"prompt_logprobs: must be between 0 and {MAX_TOP_K_LOGPROBS}; got {job.prompt_logprobs}"
            )
        stops: list[Any] = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
        if "" in stops:
            raise RefusedError("stop: must not have an empty string")
        return cls(
            prompt=prompt,
            num_samples=job.num_samples,
            params=params,
            max_tokens=_token_limit(params.max_tokens, len(prompt), base, scoring=job.prompt_logprobs is not None),
            stop_strings=[stop for stop in stops if isinstance(stop, str)],
            stop_tokens=base.end_tokens.union(stop for stop in stops if isinstance(stop, int)),
            adapter=_own(job.adapter, base),
            wanted_prompt_logprobs=job.prompt_logprobs,
        )

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether logprobs of the prompt are wanted and not computed yet."""
        return self.wanted_prompt_logprobs is not None and self.prompt_logprobs is None

    def start(self) -> Row:
        """Start the next sample."""
        index = self.started
        self.started += 1
        return Row(self, index, self._random(index))

    def finish(self, index: int, completion: Completion) -> None:
        """Add a completion; the last one sets the future's result, unless it was cancelled."""
        self.completions[index] = completion
        if len(self.completions) == self.num_samples and self._claim_future():
            in_order = [self.completions[i] for i in range(self.num_samples)]
            self.future.set_result(SampleOutcome(completions=in_order, prompt_logprobs=self.prompt_logprobs))

    def fail(self, error: Exception) -> None:
        """Set the future's error, unless it is done or was cancelled."""
        if self._claim_future():
            self.future.set_exception(error)

    def _claim_future(self) -> bool:
        return not self.future.done() and self.future.set_running_or_notify_cancel()

    def _random(self, index: int) -> random.Random:
        # One for each sample, so that its tokens do not depend on other samples; seeds that are text are hashed.
        seed = None if self.params.seed is None else f"{self.params.seed}/{index}"
        return random.Random(seed)  # noqa: S311 - samples of a model, not secrets


@dataclass(eq=False)
class Row:
    """One completion that is being generated."""

    request: Request
    index: int
    random: random.Random
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def accept(self, token: int, logprob: float, tokenizer: Any) -> bool:
        """Append a token; return whether the completion has ended."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        end = self._end(tokenizer)
        if end is not None:
            text, reason = end
            done = Completion(tokens=self.tokens, logprobs=self.logprobs, text=text, finish_reason=reason)
            self.request.finish(self.index, done)
        return end is not None

    @property
    def age(self) -> tuple[int, int]:
        """The order of arrival: less is earlier."""
        return self.request.arrival, self.index

    @property
    def context(self) -> list[int]:
        """The tokens before the next one."""
        return self.request.prompt + self.tokens if self.tokens else self.request.prompt

    def _end(self, tokenizer: Any) -> tuple[str, str] | None:
        request = self.request
        if self.tokens[-1] in request.stop_tokens:
            return _text(tokenizer, self.tokens[:-1]), "stop"
        last = len(self.tokens) == request.max_tokens
        if not (last or self._may_have_stopped(tokenizer)):
            return None
        text = _text(tokenizer, self.tokens)
        found = [at for stop in request.stop_strings if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], "stop"
        return (text, "length") if last else None

    def _may_have_stopped(self, tokenizer: Any) -> bool:
        """Look for stop strings at the end of the text only, where the newest token can have completed one."""
        stops = self.request.stop_strings
        if not stops:
            return False
        needed = max(map(len, stops)) + OPEN_TOKENS
        count = needed
        # Tokens without text, and parts of characters, make a text that is shorter than the number of its tokens.
        while count < len(self.tokens) and len(_text(tokenizer, self.tokens[-count:-OPEN_TOKENS])) < needed:
            count *= 2
        tail = _text(tokenizer, self.tokens[-count:])
        return any(stop in tail for stop in stops)


def _text(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def _valid(params: SamplingParams) -> SamplingParams:
    try:
        valid = msgspec.convert(msgspec.structs.asdict(params), SamplingParams)
    except msgspec.ValidationError as error:
        raise RefusedError(f"sampling_params: {error}") from error
    if valid.structured_outputs is not None:
        raise RefusedError("sampling_params.structured_outputs: not supported by this engine")
    return valid


def _token_limit(max_tokens: int | None, prompt: int, base: Base, *, scoring: bool) -> int:
    if not fits(prompt, max_tokens or 1, base.info.max_seq_len, scoring=scoring):
        asked = "" if max_tokens is None else f", and max_tokens is {max_tokens}"
        raise RefusedError(
            f"prompt: has {prompt} tokens{asked}; prompt and completion together can have at most "
            f"{base.info.max_seq_len} with {base.info.name}"
        )
    return max_tokens or max(1, min(base.info.max_seq_len - prompt, DEFAULT_MAX_TOKENS))


def _own(adapter: object, base: Base) -> LoraAdapter | None:
    if adapter is None:
        return None
    if not isinstance(adapter, LoraAdapter) or adapter.model != base.info.name:
        raise RefusedError(f"adapter: is not one of the base model {base.info.name!r}")
    return adapter
