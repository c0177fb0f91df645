"""Turning OpenTelemetry on: by a call, or by the environment. Nothing of it is imported before."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from .._version import __version__
from .._work.registry import instrument_all

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from .active import Active

__all__ = ["instrument", "instrument_as_the_environment_says"]

VARIABLE: Final = "LOOPS_OTEL"
NAME: Final = "loops_async"
MISSING: Final = "OpenTelemetry is not installed: pip install 'loops-async[otel]'"

log = logging.getLogger("loops_async")

_active: Active | None = None


def instrument(tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None) -> None:
    """Report the calls of all clients to OpenTelemetry, as spans and metrics: those of open clients, too.

    Each span is a child of the one that is current where the call was made. No provider, exporter or propagator is
    installed: without those of the program, nothing is recorded. Prompts, completions and messages of errors never are.
    Requests to the service carry the id of their span as ``traceparent``; those to file stores do not.
    ``LOOPS_OTEL=1`` in the environment does the same without a change of the program. Calling it again changes the
    providers.

    Args:
        tracer_provider: who records spans; the program's global one when None, also if that is set later.
        meter_provider: who records metrics, in the same way.

    Raises:
        ImportError: OpenTelemetry is not installed; the message names the extra.

    Example:
        ::

            from opentelemetry import trace

            loops.instrument()
            with trace.get_tracer("my program").start_as_current_span("evaluate"):
                ...  # the spans of calls that are made here are children of this one
    """
    try:
        from opentelemetry import metrics, trace
    except ImportError as missing:
        raise ImportError(f"instrument: {MISSING}", name=missing.name) from missing
    tracer = trace.get_tracer(NAME, __version__, tracer_provider)
    meter = metrics.get_meter(NAME, __version__, meter_provider)
    global _active
    if _active is not None:
        _active.use(tracer, meter)
        return
    from .active import Active

    _active = Active(tracer, meter)
    instrument_all(_active.observe)


def instrument_as_the_environment_says() -> None:
    """Do what ``LOOPS_OTEL`` says."""
    given = os.environ.get(VARIABLE, "").strip()
    if given not in ("", "0", "1"):
        log.warning("%s must be 1 or 0; got %r", VARIABLE, given)
    elif given == "1":
        try:
            instrument()
        except ImportError:
            log.warning("%s=1 does nothing: %s", VARIABLE, MISSING)
