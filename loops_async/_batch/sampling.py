"""Asking for the rows of a batch: rows in, records out, wherever they come from and go to."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Final, TypeAlias, cast

from anyio import to_thread

from .._http.settings import how_to_have, possible_connections
from .._sampling.adaptive import Adaptive
from .._sampling.limiter import Limiter, as_limiter
from ..errors import (
    AuthenticationError,
    BudgetExceededError,
    ClosedError,
    ConfigError,
    LoopsError,
    PermissionDeniedError,
    ProvisioningError,
)
from ..sampling import SamplingClient
from ..types import SampledPrompt
from .records import Record, answered, failed, invalid
from .rows import Row, prompt_tokens, row_of
from .settings import BatchSettings, checked

HOPELESS: Final = (
    AuthenticationError,
    PermissionDeniedError,
    ProvisioningError,
    ConfigError,
    ClosedError,
    BudgetExceededError,
)
"""Errors that all other rows would have, too."""

log: logging.Logger = logging.getLogger("loops_async.sampling")

Emit: TypeAlias = Callable[[Record], Awaitable[object]]
"""What takes each record."""


class RowSampler:
    """Asks for rows, and hands out their records in the order of completion.

    After a hopeless error, or `stop`, it asks for no more, and `stopped` says why. What is under way is awaited and
    handed out; rows that were not answered because of it have no record. One sampler may work on several sources at
    once, e.g. blocks of a dataset, which then share the limit.

    Args:
        client: what samples.
        settings: those of the batch.
        limit: the most completions in flight, as in `SamplingClient.sample_many`.
    """

    def __init__(self, client: SamplingClient, settings: BatchSettings, limit: int | Adaptive | Limiter = 256) -> None:
        self.stopped: LoopsError | None = None
        self.settings: BatchSettings = checked(settings)
        self._client = client
        self._limiter: Limiter = as_limiter(limit)
        self._tokenizer: Any = None

    def stop(self, reason: LoopsError) -> None:
        """Ask for no more; the first reason is kept."""
        self.stopped = self.stopped or reason

    def warn_of_connections(self, completions: int | None = None) -> None:
        """Warn if this process cannot have as many requests in flight as so many completions need, or its limit."""
        wanted = max(1, (self._limiter.limit if completions is None else completions) // self.settings.num_samples)
        possible = possible_connections()
        if wanted > possible:
            log.warning(
                "the limit allows %d requests in flight, but this process can have only %d, each with a connection; "
                "for all of them, %s",
                wanted,
                possible,
                how_to_have(wanted),
            )

    async def load_tokenizer(self) -> None:
        """Load the tokenizer, which rows with texts or messages need, before anything is asked for."""
        if self._tokenizer is None:
            self._tokenizer = await self._client.get_tokenizer()

    async def run(self, rows: AsyncGenerator[Row], emit: Emit) -> None:
        """Ask for rows, which are read only as fast as they are sampled, and `emit` the record of each."""
        waiting: dict[int, Row] = {}
        async with aclosing(rows), aclosing(self._prompts(rows, waiting, emit)) as prompts:
            outcomes = self._client.sample_many(
                prompts,
                num_samples=self.settings.num_samples,
                sampling_params=self.settings.sampling_params,
                include_prompt_logprobs=self.settings.include_prompt_logprobs,
                topk_prompt_logprobs=self.settings.topk_prompt_logprobs,
                limit=self._limiter,
                on_error="return",
            )
            async with aclosing(cast("AsyncGenerator[SampledPrompt]", outcomes)) as done:
                async for each in done:
                    await self._finish(waiting.pop(each.index), each, emit)

    async def _finish(self, row: Row, done: SampledPrompt, emit: Emit) -> None:
        if done.response is not None:
            await emit(answered(row, self.settings, done.response))
        elif isinstance(done.error, HOPELESS):
            self.stop(done.error)
        elif done.error is not None:
            await emit(failed(row, self.settings, done.error))

    async def _prompts(
        self, rows: AsyncGenerator[Row], waiting: dict[int, Row], emit: Emit
    ) -> AsyncGenerator[list[int]]:
        """Yield the token ids of rows, and keep the rows in `waiting` by their number."""
        number = 0
        async for row in rows:
            if row.needs_tokenizer:
                await self.load_tokenizer()
            tokens, problem = await self._encoded(row)
            if self.stopped is not None:
                return
            if problem is not None:
                await emit(invalid(row, self.settings, problem))
                continue
            waiting[number] = row
            number += 1
            yield tokens

    async def _encoded(self, row: Row) -> tuple[list[int], str | None]:
        """Return the token ids of a row's prompt, or why there are none."""
        if not row.needs_tokenizer:
            return (prompt_tokens(row.fields, None), None) if row.problem is None else ([], row.problem)
        try:
            return await to_thread.run_sync(prompt_tokens, row.fields, self._tokenizer), None
        except Exception as error:  # tokenizers and chat templates raise anything
            return [], f"the tokenizer refuses it: {error!r:.300}"


async def sample_rows(
    client: SamplingClient,
    rows: Iterable[Mapping[str, Any]],
    *,
    settings: BatchSettings,
    limit: int | Adaptive | Limiter = 256,
) -> list[dict[str, Any]]:
    """Ask for some rows, and return a record for each, in the order of completion.

    This is the part of a batch that another engine can call for each of its blocks: it needs no files. All rows are
    checked before anything is sent.

    Args:
        client: what samples.
        rows: objects with ``prompt`` (text or token ids) or ``messages``, and optionally ``id``; other fields are
            carried through. Give equal rows an ``id`` each: otherwise their records have the same key.
        settings: `BatchSettings.of` the client.
        limit: the most completions in flight; blocks that share a `Limiter` share its places.

    Returns:
        Records, as docs/sampling.md describes them, without ``index``.

    Raises:
        InputError: a row has a field with the name of a record's.
        LoopsError: no other row could be answered either, e.g. since the API key was refused; nothing is returned
            then. The errors of single rows are in their records.
    """
    sampler = RowSampler(client, settings, limit)
    given = [row_of(row, sampler.settings, where=f"rows[{number}]") for number, row in enumerate(rows)]
    if any(row.needs_tokenizer for row in given):
        await sampler.load_tokenizer()

    async def each() -> AsyncGenerator[Row]:
        for row in given:
            yield row

    records: list[Record] = []

    async def emit(record: Record) -> None:
        records.append(record)

    await sampler.run(each(), emit)
    if sampler.stopped is not None:
        raise sampler.stopped
    return records
