"""Observing must not disturb what is observed: exporters and samplers of a program may fail."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("loops_async")

_told: Final[set[str]] = set()


def harmless(function: Callable[P, T]) -> Callable[P, T | None]:
    """Make a function return None where it would raise; the first failure of each kind is a warning."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return function(*args, **kwargs)
        except Exception as failure:
            if (kind := type(failure).__qualname__) not in _told:
                _told.add(kind)
                log.warning("OpenTelemetry failed, and a span or a number is missing", exc_info=failure)
            return None

    return call
