"""What is open, and how it ends: when a script closes its client, and when the process ends without that."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Iterable
from importlib import import_module
from typing import Any, Final

import loops_async as loops
import loops_sync

__all__ = ["close", "open_service"]

EXIT_SECONDS: Final = 2.0
"""How long the exit of the interpreter waits for what is open."""

# anyio loads this at its first need. Were that at the exit, Python would forget that Ctrl-C has ended the script, and
# exit with 1: any text that is executed after an unhandled KeyboardInterrupt, as by a dataclass, lets it forget.
import_module("anyio._backends._asyncio")

log: logging.Logger = logging.getLogger("loops_tinker")

# Held here, since a script may drop its clients without closing them, which must not be reported.
_open: set[loops_sync.ServiceClient] = set()


def open_service(settings: dict[str, Any]) -> loops_sync.ServiceClient:
    """Return a new client of the service, with a session."""
    core = loops_sync.ServiceClient(**settings)
    _open.add(core)
    return core


def close(
    core: loops_sync.ServiceClient, created: Iterable[loops_sync.TrainingClient | loops_sync.SamplingClient]
) -> None:
    """Deactivate what a client created, and close it."""
    for each in created:
        try:
            each.deactivate()
        except loops.LoopsError as error:
            log.info("not deactivated: %s", error)
    _open.discard(core)
    core.close()


@atexit.register
def _close_at_exit() -> None:
    """Close connections without a word; what runs is left, since an operation may be on its way there."""
    closing = threading.Thread(target=_close_all, name="loops_tinker", daemon=True)
    closing.start()
    closing.join(EXIT_SECONDS)


def _close_all() -> None:
    while _open:
        _open.pop().close()
