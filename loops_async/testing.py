"""Cassettes: record what a program asks a service and is answered, then test it with these answers, without a network.

A cassette is a file of JSON lines, an exchange in each, to be committed with the test. The API key, other secrets and
the queries of signed URLs are masked in it; prompts, completions and data are not.

Example:
    ::

        with loops.testing.record("cassettes/sample.jsonl"):  # later: replay
            async with loops.ServiceClient() as service:
                sampler = await service.create_sampling_client("Qwen/Qwen3-0.6B")
                answer = await sampler.sample(prompt)
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from . import _waiting
from ._arguments import check_positive
from ._cassettes.file import Cassette
from ._cassettes.player import Player
from ._cassettes.recorder import Recorder
from ._http import tape

__all__ = ["record", "replay"]


@contextmanager
def record(path: str | os.PathLike[str], *, largest_file: int = 1 << 20) -> Generator[None]:
    """Record the requests of all clients of this process while the block runs.

    The file is written when the block ends, also with an error: as a whole, in the place of an earlier one, readable by
    its owner only. After Ctrl-C or a cancellation, nothing is written, and an earlier file stays.

    Args:
        path: the file; missing folders are made.
        largest_file: the most bytes of a downloaded file that are kept. A larger one is refused on replay.

    Raises:
        RuntimeError: a cassette is in use already.
        OSError: the file cannot be written.
    """
    recorder = Recorder(int(check_positive(largest_file, "largest_file")))
    try:
        with _in_use(recorder):
            yield
    except Exception:
        recorder.cassette.write(Path(path))
        raise
    recorder.cassette.write(Path(path))


@contextmanager
def replay(path: str | os.PathLike[str]) -> Generator[None]:
    """Answer the requests of all clients of this process from a cassette while the block runs. Nothing is sent.

    Clients need no key and no `base_url`. Equal requests are answered in the order in which they were recorded; ids
    that the client draws, e.g. idempotency keys, may differ. Retries, polls and waits do not pause, and time limits
    that expired expire at once. Not every recorded request must be made.

    Args:
        path: the file.

    Raises:
        InputError: there is no such file, or it is no cassette.
        NotRecordedError: a request was not recorded. It is raised where the request is made, and again at the end of
            the block if the program went on.
        RuntimeError: a cassette is in use already.
    """
    player = Player(Cassette.read(Path(path)), Path(path))
    with _in_use(player):
        _waiting.running_limits = set()
        try:
            yield
        finally:
            _waiting.running_limits = None
    if player.refused:
        raise player.refused[0]


@contextmanager
def _in_use(used: tape.Tape) -> Generator[None]:
    if tape.current is not None:
        raise RuntimeError("a cassette is in use already; leave its block first")
    tape.current = used
    try:
        yield
    finally:
        tape.current = None
