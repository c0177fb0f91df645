"""What is open, and how it ends: when a script closes its client, or without a word at the end of the process.

There, `loops_sync` ends its connections by itself; what runs is left, since an operation may be on its way there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import loops_async as loops
import loops_sync

__all__ = ["close", "open_service"]

# anyio loads this at its first need. Were that at the exit, Python would forget that Ctrl-C has ended the script, and
# exit with 1: any text that is executed after an unhandled KeyboardInterrupt, as by a dataclass, lets it forget.
import_module("anyio._backends._asyncio")

log: logging.Logger = logging.getLogger("loops_tinker")

# Kept until the process ends: a script may drop its clients without closing them, which must not be reported.
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
