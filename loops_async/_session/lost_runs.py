"""Finding the run of a creation whose answer was lost, so that it is neither created twice nor left running.

The service has no key that makes a repeated creation harmless. But a session belongs to the client that opened it, so
a run of its session that no answer named is one whose answer was lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from .._http.retry import until
from ..control_plane import NewRun, RunLedger, lost_run
from ..errors import LoopsError, LostAnswerError
from ..types import CreateRunRequest, Run

SEARCH_SECONDS: Final = 10.0
"""How long a run is looked for: the service may still be creating it."""


async def find_lost_run(
    request: CreateRunRequest, lost: LostAnswerError, ledger: RunLedger, list_runs: Callable[[], Awaitable[list[Run]]]
) -> Run:
    """Return the run that `request` created though its answer was lost.

    Raises:
        LostAnswerError: no run was found, or those that were could be another request's: they are its `candidates`.
    """
    candidates: list[Run] = []

    async def look() -> Run | None:
        nonlocal candidates
        listed = sorted(await list_runs(), key=lambda run: run.created_at)
        candidates = [run for run in listed if run.id not in ledger.known and may_be(request, run)]
        if not candidates or any(may_be(other, run) for other in ledger.in_flight for run in candidates):
            return None  # not created yet, or an answer under way will name them
        # Runs of equal requests are as good as each other; those of different requests cannot be told apart.
        if any(other != request and may_be(other, run) for other in ledger.unanswered for run in candidates):
            return None
        ledger.resolve(request, candidates[0].id)  # at once, so that no other search takes the same run
        return candidates[0]

    found: Run | None = None
    with suppress(LoopsError):  # what cannot be listed is not found
        found = await until(look, seconds=SEARCH_SECONDS, longest_pause=2.0)
    if found is not None:
        return found
    if not candidates:
        raise lost
    raise lost_run(request, lost.__cause__, candidates) from lost.__cause__


def may_be(request: NewRun, run: Run) -> bool:
    """Whether a run can be the one that a request created."""
    is_named = isinstance(request.name, str)
    return (
        run.session_id == request.session_id
        and run.base_model == request.base_model
        and (not is_named or run.name in (None, request.name))
    )
