"""What a stream of rollouts continues from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from .._files import write_whole
from .._values import Value
from ..errors import InputError

__all__ = ["RolloutState"]

_Count = Annotated[int, Meta(ge=0)]


class RolloutState(Value, Struct, frozen=True, kw_only=True):
    """Where a stream of rollouts stands: pass it to `TrainingClient.rollouts` to continue, with the same tasks.

    It is that of the steps handed out: `version` is their number. Tasks are numbered in their order: those from
    `next_index` on were never begun; `pending` are numbers before that of tasks that were begun but not trained, which
    are rolled out again. `dropped` and `failed` count groups. `path` is the training state that was saved together
    with this one, as for `ServiceClient.create_training_client_from_state_with_optimizer`, and `run_id` the run that
    saved it; None when none was saved.

    Example:
        >>> from loops_async import RolloutState
        >>> RolloutState.read("nowhere/rollouts.json") is None  # so the stream begins at the first task
        True
    """

    version: _Count = 0
    next_index: _Count = 0
    pending: list[_Count] = []
    dropped: _Count = 0
    failed: _Count = 0
    path: str | None = None
    run_id: str | None = None

    def write(self, file: str | os.PathLike[str]) -> None:
        """Write to a file, which is complete and on disk afterwards; if this is cut short, it is as it was before.

        Raises:
            OSError: the file cannot be written, e.g. its folder does not exist.
        """
        write_whole(Path(file), [msgspec.json.format(msgspec.json.encode(self)), b"\n"])

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> RolloutState | None:
        """Read what `write` has written; None when the file does not exist, as before the first save.

        Raises:
            InputError: the file holds something else.
        """
        try:
            content = Path(file).read_bytes()
        except FileNotFoundError:
            return None
        try:
            state = msgspec.json.decode(content, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as problem:
            raise InputError(
                str(file), f"is not a file that RolloutState.write wrote: {problem}. Delete it to start anew"
            ) from None
        return state

    def __post_init__(self) -> None:
        if any(index >= self.next_index for index in self.pending) or len(set(self.pending)) < len(self.pending):
            raise InputError(
                "pending", f"must be different numbers of tasks before next_index={self.next_index}; got {self.pending}"
            )
