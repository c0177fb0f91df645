"""Operations of which a trainer has perhaps, or in part, executed what was sent, and how they are sent again.

The trainer executes what has the same idempotency key once. So a call that repeats an unfinished one gets its keys:
what was executed is not executed again, and the rest is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Final
from uuid import uuid4

from anyio import to_thread
from msgspec import Struct

from ..errors import InputError, LoopsError, RemoteOpError, UnfinishedSubmission
from .operation import Encoded, MakeBody

ADVICE: Final = (
    "Make the same call again before any other, or later with resume=error.unfinished: what was executed is not "
    "executed again."
)


class Part(Struct):
    """One request of an operation. `operation_id` is known when it was accepted; until then it may be uncertain.

    `outcome` or `failure`, both JSON, are known where the journal has them.
    """

    body: MakeBody
    key: str
    datums: int
    operation_id: str | None = None
    may_be_accepted: bool = False
    outcome: bytes | None = None
    failure: bytes | None = None


def new_key() -> str:
    """Return an idempotency key that was never used."""
    return uuid4().hex


def new_parts(encoded: Encoded[Any]) -> list[Part]:
    """Return the parts of an operation that repeats no other."""
    return [Part(body, new_key(), datums) for body, datums in zip(encoded.bodies, encoded.datums, strict=True)]


async def parts_of(
    name: str, encoded: Encoded[Any], *, resume: UnfinishedSubmission | None, latest: UnfinishedSubmission | None
) -> list[Part]:
    """Return the parts of an operation, with the keys of the unfinished one that it repeats, or with new ones.

    Raises:
        InputError: it does not repeat what it should `resume`.
    """
    earlier = resume or latest
    if earlier is not None and earlier.operation == name and earlier.digest == await digest_of(encoded):
        repeated = zip(encoded.bodies, earlier.keys, encoded.datums, strict=True)
        return [Part(body, key, datums, may_be_accepted=True) for body, key, datums in repeated]
    if resume is not None:
        raise InputError(
            "resume", f"belongs to another call of {resume.operation}; repeat that with the same arguments"
        )
    return new_parts(encoded)


async def digest_of(encoded: Encoded[Any]) -> str:
    """Return what identifies the content of an operation, which may be large."""
    bodies = [body(0) for body in encoded.bodies]

    def digest() -> str:
        sha = hashlib.sha256()
        for body in bodies:
            sha.update(body.size.to_bytes(8, "big"))
            for piece in body.parts:
                sha.update(piece)
        return sha.hexdigest()

    return await to_thread.run_sync(digest)


async def mark_not_accepted(error: LoopsError, name: str, encoded: Encoded[Any], parts: Sequence[Part]) -> None:
    """Complete the error of a submission that failed although some of it may have been accepted."""
    accepted = [part for part in parts if part.operation_id is not None]
    if len(parts) == 1:
        state = f"The trainer may have accepted {name} (idempotency key {parts[0].key})."
    else:
        certain, uncertain = _ranges(parts)[: len(accepted)], _ranges(parts)[len(accepted)]
        state = (
            f"The batch was sent in {len(parts)} parts. The trainer has accepted {', '.join(certain) or 'none'}"
            + (f" and may have accepted {uncertain}" if parts[len(accepted)].may_be_accepted else "")
            + (", whose gradients count in the next optim_step." if name == "forward_backward" else ".")
        )
    error.args = (f"{error} {state} {ADVICE}",)
    error.retryable = False
    error.unfinished = UnfinishedSubmission(
        operation=name,
        keys=tuple(part.key for part in parts),
        digest=await digest_of(encoded),
        accepted=sum(part.datums for part in accepted),
    )


async def mark_failed(
    error: LoopsError, name: str, encoded: Encoded[Any], parts: Sequence[Part], outcomes: Sequence[object]
) -> None:
    """Complete the error of a batch of which only some parts failed when they were executed."""
    has_failed = [isinstance(outcome, BaseException) for outcome in outcomes]
    failed, done = (
        ", ".join(text for text, fails in zip(_ranges(parts), has_failed, strict=True) if fails is wanted)
        for wanted in (True, False)
    )
    gradients = ", whose gradients count in the next optim_step" if name == "forward_backward" else ""
    state = f"{failed} failed; the trainer has executed {done or 'none'}{gradients}."
    error.args = (f"{error} The batch was sent in {len(parts)} parts: {state} {ADVICE}",)
    error.unfinished = UnfinishedSubmission(
        operation=name,
        # A key stands for its outcome, so what failed needs a new one.
        keys=tuple(
            new_key() if isinstance(outcome, RemoteOpError) else part.key
            for part, outcome in zip(parts, outcomes, strict=True)
        ),
        digest=await digest_of(encoded),
        accepted=sum(part.datums for part, fails in zip(parts, has_failed, strict=True) if not fails),
    )


def _ranges(parts: Sequence[Part]) -> list[str]:
    """Return the datums of each part, e.g. ``data[0:40]``."""
    ends = accumulate((part.datums for part in parts), initial=0)
    return [f"data[{start}:{stop}]" for start, stop in pairwise(ends)]
