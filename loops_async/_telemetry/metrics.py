"""Metrics: how long calls take, what they use, how often they are retried, and how many are under way."""

from __future__ import annotations

from time import monotonic

from opentelemetry.metrics import Meter, UpDownCounter

from .._work.registry import Entry
from . import names
from .attributes import Attributes, error_type, of_sample, output_tokens
from .harmless import harmless


class Metrics:
    """Observes work, and counts it."""

    def __init__(self, meter: Meter) -> None:
        self._under_way: dict[Entry, UpDownCounter] = {}
        """Each with the counter that has counted it, since another meter may be set meanwhile."""
        self.use(meter)

    def use(self, meter: Meter) -> None:
        """Make the instruments."""
        self._gen_ai_duration = meter.create_histogram(
            names.GEN_AI_DURATION,
            "s",
            "The time of a sample, from the call to its end.",
            explicit_bucket_boundaries_advisory=names.GEN_AI_SECONDS,
        )
        self._gen_ai_tokens = meter.create_histogram(
            names.GEN_AI_TOKENS,
            "{token}",
            "The tokens of the prompt of a sample, and of its completions.",
            explicit_bucket_boundaries_advisory=names.GEN_AI_TOKEN_COUNTS,
        )
        self._duration = meter.create_histogram(
            names.DURATION,
            "s",
            "The time of an operation of a trainer, from the call to its outcome.",
            explicit_bucket_boundaries_advisory=names.SECONDS,
        )
        self._retries = meter.create_counter(names.RETRIES, "{retry}", "The requests that were sent again.")
        self._in_flight = meter.create_up_down_counter(names.IN_FLIGHT, "{call}", "What is under way.")

    @harmless
    def begun(self, entry: Entry) -> None:
        """Count it as under way."""
        self._under_way[entry] = self._in_flight
        self._in_flight.add(1, {names.KIND: entry.kind})

    @harmless
    def event(self, entry: Entry, name: str) -> None:
        """Count retries."""
        if name == "retry":
            self._retries.add(1, {names.KIND: entry.kind})

    @harmless
    def ended(self, entry: Entry, error: BaseException | None) -> None:
        """Count it as no longer under way, and record its time and its tokens."""
        if (counter := self._under_way.pop(entry, None)) is not None:
            counter.add(-1, {names.KIND: entry.kind})
        seconds = monotonic() - entry.began
        failure: Attributes = {} if error is None else {names.ERROR_TYPE: error_type(error)}
        if entry.kind == "sample":
            group = of_sample(entry)
            self._gen_ai_duration.record(seconds, group | failure)
            if entry.result is not None:
                self._gen_ai_tokens.record(entry.subject.length, group | {names.GEN_AI_TOKEN_TYPE: "input"})
                self._gen_ai_tokens.record(output_tokens(entry.result), group | {names.GEN_AI_TOKEN_TYPE: "output"})
        elif entry.kind == "operation":
            operation: Attributes = {names.OPERATION: entry.what, names.GEN_AI_MODEL: entry.endpoint.base_model}
            self._duration.record(seconds, operation | failure)
