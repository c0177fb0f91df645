"""Records what is reported to OpenTelemetry, in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NoOpTracerProvider

import loops_async


class Recorded:
    """The spans and metrics since `begin`."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meters = MeterProvider([self._reader])
        self.tracer = self.tracers.get_tracer("tests")

    def begin(self) -> None:
        loops_async.instrument(self.tracers, self.meters)

    def end(self) -> None:
        loops_async.instrument(NoOpTracerProvider(), NoOpMeterProvider())
        self.tracers.shutdown()
        self.meters.shutdown()

    def all(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        """Return the spans whose names begin with a word, the oldest first."""
        return sorted((span for span in self.all() if span.name.split()[0] == name), key=lambda span: span.start_time)

    def one(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.all() if span.name == name]
        return span

    def children(self, parent: ReadableSpan) -> list[ReadableSpan]:
        """Return the spans right below another one, the oldest first."""
        below = [span for span in self.all() if span.parent and span.parent.span_id == parent.context.span_id]
        return sorted(below, key=lambda span: span.start_time)

    def points(self, metric: str) -> list[tuple[dict[str, Any], Any]]:
        """Return the attributes and the data of each point of a metric."""
        data = self._reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
        found = [each for scope in scopes for each in scope.metrics if each.name == metric]
        return [(dict(point.attributes), point) for each in found for point in each.data.data_points]

    def text(self) -> str:
        """Return everything that was recorded."""
        spans = [json.loads(span.to_json()) for span in self.all()]
        data = self._reader.get_metrics_data()
        return json.dumps(spans) + (data.to_json() if data else "")


def facts(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def events(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]
