"""What the parts of a client record in its journal, and find there when its program is started again."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from msgspec import Struct

from ..errors import ConfigError, JournalError
from ..protocol import encode
from .content import Content, digest
from .records import Completed, Creation, RecordedOperation

if TYPE_CHECKING:
    from .file import JournalFile

T = TypeVar("T")

KEPT_SECONDS: Final = 50 * 60.0
"""How long the service certainly knows a key: it keeps an outcome for about an hour (data-plane reference 1.1)."""


class JournalSettings(Struct, frozen=True):
    """Where the journal is, and whether samples are recorded, too."""

    path: Path
    samples: bool = False


def journal_settings(path: str | os.PathLike[str] | None, samples: Any) -> JournalSettings | None:
    """Return what the arguments of a client say; None for no journal.

    Raises:
        ConfigError: an argument is invalid.
    """
    if not isinstance(samples, bool):
        raise ConfigError(f"journal_samples must be True or False; got {samples!r}")
    if path is None:
        if samples:
            raise ConfigError("journal_samples=True needs journal=PATH, where they are recorded")
        return None
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ConfigError(f"journal must be the path of a file; got {path!r}")
    return JournalSettings(Path(os.fspath(path)).absolute(), samples)


class Journal:
    """The journal of one open client."""

    def __init__(self, settings: JournalSettings, base_url: str) -> None:
        from .file import JournalFile  # and with it SQLite, which only a client with a journal needs
        from .thread import JournalThread

        self.path: Path = settings.path
        self._records_samples = settings.samples
        self._thread = JournalThread(partial(JournalFile, settings.path, base_url))
        self._id = ""
        self._has_samples = False
        self._numbers: dict[str, int] = {}

    async def open(self) -> None:
        """Open the file.

        Raises:
            JournalError: it is no journal, is of another service or version, or is in use.
        """
        file = await self._thread.opened()
        self._id, self._has_samples = file.id, file.has_samples

    async def close(self) -> None:
        """Write what was recorded, and end the thread."""
        await self._thread.close()

    def numbered(self, what: str) -> str:
        """Return `what` with a number: that of this call for `what`, which is the same each time the program starts."""
        number = self._numbers[what] = self._numbers.get(what, 0) + 1
        return f"{what}, {number}"

    def unique(self, name: str) -> str:
        """Return a name that no other call gets, in no other journal; the n-th for `name` is the same at each start."""
        return f"{name}-{digest(f'{self._id}/{self.numbered(name)}'.encode()).hex()}"

    # --- creations ---

    async def creation(self, kind: str, request: Struct) -> Creation:
        """Return the record of a session, a run or a sampler that is about to be created, or was.

        Raises:
            JournalMismatchError: the program asked for another one before.
            JournalError: the program has deactivated it.
        """
        body = encode(request)
        found = await self._thread.run(lambda file: file.creation(kind, body))
        if found.ended is not None:
            raise await self.gone(found, f"was deactivated by this program at {time.ctime(found.ended)}")
        return found

    async def creations(self, kind: str) -> list[Creation]:
        """Return all creations of a kind."""
        return await self._thread.run(lambda file: file.creations(kind))

    async def created(self, creation: Creation, id_: str) -> None:
        """Record the id of what was made."""
        await self._thread.run(lambda file: file.created(creation.number, id_))

    async def forget(self, creation: Creation) -> None:
        """Forget a creation that has left nothing: the next start makes it again."""
        await self._thread.run(lambda file: file.forget_creation(creation.number))

    def ended(self, id_: str) -> None:
        """Record that this client deactivated a run or a sampler."""
        self._thread.post(lambda file: file.ended(id_))

    async def gone(self, creation: Creation, what: str) -> JournalError:
        """Return the error for a recorded run or sampler that is of no use any longer: it says how to go on."""
        id_ = str(creation.id)
        state = await self._thread.run(lambda file: file.last_state(id_)) if creation.kind == "run" else None
        advice = "Start again with a new journal."
        if creation.kind == "run":
            advice = (
                "It saved no training state, so start again with a new journal."
                if state is None
                else f"Go on from its last saved state with a new journal: create_training_client_from_state("
                f"{state!r}), or ..._with_optimizer."
            )
        return JournalError(f"{creation.kind} {id_} of the journal {self.path} {what}. {advice}")

    # --- operations ---

    async def begin(
        self, run_id: str, place: int, content: Callable[[], Content], keys: Sequence[str], *, repeats: bool
    ) -> RecordedOperation:
        """Record an operation before it is sent, or return what is recorded in its place; see `JournalFile.begin`.

        Raises:
            JournalMismatchError: another operation is recorded there.
            JournalError: it is not known whether it was executed, and the service no longer knows it.
        """
        found = await self._thread.run(lambda file: file.begin(run_id, place, content(), keys, repeats=repeats))
        is_known = all(part.operation_id is not None for part in found.parts) or found.is_refused
        if found.is_earlier and not is_known and time.time() - found.begun > KEPT_SECONDS:
            run = Creation(0, "run", b"", found.begun, run_id)
            raise await self.gone(
                run,
                f"may have executed operation {found.place}, which was sent at {time.ctime(found.begun)}, or may not: "
                "the program ended before the answer came, and the service knows a key for about an hour only, so it "
                "was not sent again",
            )
        return found

    def accepted(self, run_id: str, key: str, operation_id: str) -> None:
        """Record the id of a part."""
        self._thread.post(lambda file: file.accepted(run_id, key, operation_id))

    def done(self, run_id: str, key: str, outcome: bytes) -> None:
        """Record the result of a part."""
        self._thread.post(lambda file: file.done(run_id, key, outcome))

    def failed(self, run_id: str, key: str, failure: bytes) -> None:
        """Record the failure of a part."""
        self._thread.post(lambda file: file.failed(run_id, key, failure))

    def refused(self, run_id: str, place: int) -> None:
        """Record that an operation was refused."""
        self._thread.post(lambda file: file.refused(run_id, place))

    def withdrawn(self, run_id: str, place: int) -> None:
        """Forget an operation that certainly did not reach the service."""
        self._thread.post(lambda file: file.withdrawn(run_id, place))

    # --- samples ---

    @property
    def records_samples(self) -> bool:
        """Whether samples are recorded."""
        return self._records_samples

    async def sample(
        self,
        request: Sequence[bytes],
        key: str,
        ask: Callable[[str], Awaitable[Completed]],
        *,
        floor: int,
        is_queued: bool,
    ) -> Completed:
        """Return the recorded answer to a sample, or that of `ask`, and record it.

        Args:
            request: what identifies the request.
            key: the key of a new sample.
            ask: sends it, with a key: this one, or that under which an earlier process has sent it.
            floor: the oldest weights that may have answered it.
            is_queued: whether the receiver executes what has the same key once, so that an answer that an earlier
                process did not see can still be had.
        """
        self._thread.check()
        made, number = digest(*request), 0
        if self._has_samples or is_queued:
            oldest = time.time() - KEPT_SECONDS
            found = await self._thread.run(
                lambda file: file.take_sample(made, floor=floor, key=key, is_kept=is_queued, oldest=oldest)
            )
            if found.answer is not None:
                return found.answer
            number, key = found.number, found.key
        answer = await ask(key)
        with suppress(JournalError):  # it is logged, and ends the next call; this answer is paid for
            await self._thread.run(lambda file: file.sampled(made, number, answer))
        return answer

    # --- batches of rollouts ---

    async def batch(self, stream: str, place: int, decode: Callable[[bytes], T]) -> T | None:
        """Return a recorded batch of a stream."""

        def read(file: JournalFile) -> T | None:
            found = file.batch(stream, place)
            return None if found is None else decode(found)

        return await self._thread.run(read)

    async def put_batch(self, stream: str, place: int, batch: Callable[[], bytes]) -> None:
        """Record a batch before it is handed out."""
        await self._thread.run(lambda file: file.put_batch(stream, place, batch()))
