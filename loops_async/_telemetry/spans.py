"""Spans: one for each sample, operation, provisioning and download, and one for each attempt of their requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from opentelemetry.context import Context, get_current
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .._http.attempts import NUMBER, request_id
from .._text import one_line
from .._work.registry import CURRENT, Entry, Work
from ..types import CreateRunRequest
from . import names
from .attributes import Attributes, asked, came_of_it, error_type
from .harmless import harmless

LONGEST_EVENT: Final = 100

NOT_DONE_YET: Final = ("GET", 408)
"""The answer to a poll of an operation that goes on."""

_trace_context: Final = TraceContextTextMapPropagator()
"""Not the program's propagator, which may also send baggage: what a program keeps there is not for the service."""


class _Place(NamedTuple):
    """Where an entry is in the traces: its own span, if it has one, and the context of its parts."""

    context: Context
    span: Span | None


class Spans:
    """Observes work, and makes spans of it, as children of what is current where the call was made."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer: Tracer = tracer
        self._places: dict[Entry, _Place] = {}

    @harmless
    def begun(self, entry: Entry) -> None:
        """Begin a span, unless what begins has none of its own, e.g. a wait."""
        context, span = self.here(), None
        match entry.kind:
            case "sample":
                span = self._start(f"{names.TEXT_COMPLETION} {entry.endpoint.base_model}", SpanKind.CLIENT, entry)
            case "operation":
                span = self._start(f"{entry.what} {entry.endpoint.base_model}", SpanKind.CLIENT, entry)
            case "provisioning":
                kind = "run" if isinstance(entry.subject, CreateRunRequest) else "sampler"
                span = self._start(f"provision {kind}", SpanKind.INTERNAL, entry)
            case "download":
                span = self._start("download_checkpoint", SpanKind.INTERNAL, entry)
            case "request" | "readiness":
                pass
        self._places[entry] = _Place(context if span is None else set_span_in_context(span, context), span)

    @harmless
    def event(self, entry: Entry, name: str) -> None:
        """Add an event to the span of an entry."""
        place = self._places.get(entry)
        if place is not None and place.span is not None:
            place.span.add_event(one_line(name, LONGEST_EVENT))

    @harmless
    def ended(self, entry: Entry, error: BaseException | None) -> None:
        """End the span of an entry."""
        place = self._places.pop(entry, None)
        if place is not None and place.span is not None:
            if place.span.is_recording():
                place.span.set_attributes(came_of_it(entry))
            _end(place.span, None if error is None else error_type(error))

    def here(self) -> Context:
        """Return the context of what is under way here, or else that of the program."""
        place = self._places.get(CURRENT.get())
        return get_current() if place is None else place.context

    def _start(self, name: str, kind: SpanKind, entry: Entry) -> Span:
        return self.tracer.start_span(name.rstrip(), self.here(), kind, asked(entry))


class _Sent(NamedTuple):
    method: str
    span: Span


class Requests:
    """Watches the attempts of one client's requests, and makes spans of those that are children of another one."""

    def __init__(self, spans: Spans, work: Work) -> None:
        self._spans = spans
        self._clean = work.clean

    @harmless
    def request(
        self, method: str, url: str, headers: dict[str, str], body: object, /, *, has_signed_url: bool
    ) -> _Sent | None:
        """Begin a span, and send its id along, but never to a file store, which is not part of the service."""
        context = self._spans.here()
        if not get_current_span(context).get_span_context().is_valid:
            return None
        attributes: Attributes = {names.HTTP_METHOD: method, names.HTTP_URL: self._clean(_place(url))}
        if (number := NUMBER.get()) > 1:
            attributes[names.HTTP_RESENDS] = number - 1
        span = self._spans.tracer.start_span(method, context, SpanKind.CLIENT, attributes)
        if not has_signed_url:
            _trace_context.inject(headers, set_span_in_context(span, context))
        return _Sent(method, span)

    @harmless
    def response(
        self, sent: _Sent | None, ms: float, status: int, headers: Mapping[str, str], body: bytes | None, /
    ) -> None:
        """End the span with an answer."""
        if sent is None:
            return
        method, span = sent
        span.set_attribute(names.HTTP_STATUS, status)
        if (id_ := request_id(headers)) is not None:
            span.set_attribute(names.REQUEST_ID, self._clean(id_))
        _end(span, str(status) if status >= 400 and (method, status) != NOT_DONE_YET else None)

    @harmless
    def error(self, sent: _Sent | None, ms: float, error: BaseException, /) -> None:
        """End the span without an answer."""
        if sent is not None:
            _end(sent.span, error_type(error))


def _place(url: str) -> str:
    """Return a URL without its user, its query and its fragment."""
    scheme, _, rest = url.partition("?")[0].partition("#")[0].partition("//")
    host, slash, path = rest.partition("/")
    return f"{scheme}//{host.rpartition('@')[2]}{slash}{path}"


def _end(span: Span, error: str | None) -> None:
    if error is not None:
        span.set_attribute(names.ERROR_TYPE, error)
        span.set_status(StatusCode.ERROR)  # without the message, which may quote what was sent
    span.end()
