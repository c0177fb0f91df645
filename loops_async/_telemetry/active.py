"""What is told of the work of all clients, once OpenTelemetry is on."""

from __future__ import annotations

from opentelemetry.metrics import Meter
from opentelemetry.trace import Tracer

from .._work.registry import Work
from .metrics import Metrics
from .spans import Requests, Spans


class Active:
    """Makes spans with `tracer`, and metrics with `meter`."""

    def __init__(self, tracer: Tracer, meter: Meter) -> None:
        self._spans = Spans(tracer)
        self._metrics = Metrics(meter)

    def use(self, tracer: Tracer, meter: Meter) -> None:
        """Use others for what begins from now on."""
        self._spans.tracer = tracer
        self._metrics.use(meter)

    def observe(self, work: Work) -> None:
        """Observe the work of one client; twice is once."""
        if self._spans not in work.observers:
            work.observers += [self._spans, self._metrics]
            # First, so that what others write of a request has the header that is added to it.
            work.watchers.insert(0, Requests(self._spans, work))
