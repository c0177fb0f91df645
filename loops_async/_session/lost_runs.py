"""Finding a run whose creation was never answered, so that it is neither created twice nor left running.

The service has no idempotency key for creations. But a session belongs to the client that opened it, so a run of that
session that appears in no answer is one whose answer was lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final

from msgspec import UNSET

from .._http.retry import until
from ..control_plane import NewRun, RunLedger, lost_run
from ..errors import LoopsError, LostAnswerError, ProtocolError
from ..types import CreateSamplerRequest, Run, Sampler

SEARCH_SECONDS: Final = 10.0
"""The time limit of the search: the service may still be creating the run."""

CLOCK_SECONDS: Final = 60.0
"""How far the clock of the service may be behind."""


async def find_lost_run(
    request: NewRun, lost: LostAnswerError, ledger: RunLedger, list_runs: Callable[[], Awaitable[list[Run]]]
) -> Run:
    """Return the run that `request` created, whose answer was lost.

    Raises:
        LostAnswerError: no run was found, or the runs found may belong to another request: they are its `candidates`.
    """
    candidates: list[Run] = []

    async def search() -> Run | None:
        nonlocal candidates
        try:
            listed = await list_runs()
        except ProtocolError:  # e.g. a gateway's page: it says nothing of the run
            return None
        found, candidates = lost_run_among(listed, request, ledger)
        return found

    found: Run | None = None
    with suppress(LoopsError):  # if runs cannot be listed, none is found
        found = await until(search, seconds=SEARCH_SECONDS, longest_pause=2.0)
    if found is not None:
        return found
    if not candidates:
        raise lost
    raise lost_run(request, lost.__cause__, candidates) from lost.__cause__


def lost_run_among(listed: Sequence[Run], request: NewRun, ledger: RunLedger) -> tuple[Run | None, list[Run]]:
    """Return the run that an unanswered `request` created, None if that is not certain; and those that it may be."""
    oldest_first = sorted(listed, key=lambda run: run.created_at)
    candidates = [run for run in oldest_first if run.id not in ledger.known and may_be(request, run)]
    if not candidates or any(may_be(other, run) for other in ledger.in_flight for run in candidates):
        return None, candidates  # not created yet, or the answer to a pending request will name them
    # Runs of equal requests are interchangeable; those of different requests cannot be distinguished.
    if any(other != request and may_be(other, run) for other in ledger.unanswered for run in candidates):
        return None, candidates
    ledger.resolve(request, candidates[0])  # before any await, so that no other search takes the same run
    return candidates[0], candidates


def may_be(request: NewRun, run: Run) -> bool:
    """Whether `request` may have created `run`."""
    is_named = isinstance(request.name, str)
    return (
        run.session_id == request.session_id
        and run.base_model == request.base_model
        and (not is_named or run.name in (None, request.name))
    )


def may_be_sampler(request: CreateSamplerRequest, sampler: Sampler, started: datetime) -> bool:
    """Whether `request`, sent at the time `started` of this machine, may have created `sampler`."""
    is_new = sampler.created_at > started - timedelta(seconds=CLOCK_SECONDS)
    return is_new and request.base_model in (None, UNSET, sampler.base_model)
