"""What OpenTelemetry costs a sample: CPU with everything off and with it on, in turn, in one process.

On, each sample is two spans and five numbers, which the SDK keeps in memory. "without an SDK" is what the
instrumentation costs a program that turns it on and sets no provider.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NoOpTracerProvider

import loops_async as loops
from benchmarks.harness import serving
from benchmarks.peers.measure import MAX_TOKENS, PROMPT, SAMPLES, in_flight

CALLS = 1024


async def measure(url: str, rounds: int, at_once: int) -> dict[str, list[float]]:
    """Return the microseconds of CPU per sample, by variant and round."""
    exporter, tracers = InMemorySpanExporter(), TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    meters = MeterProvider([InMemoryMetricReader()])
    async with loops.ServiceClient(base_url=url, api_key="benchmark", on_exit="leave") as service:
        sampler = await service.create_sampling_client("bench")
        work = (await sampler._usable_runtime()).transport.work
        prompt, params = loops.ModelInput.from_ints(PROMPT), loops.SamplingParams(max_tokens=MAX_TOKENS)

        async def sample() -> None:
            await sampler.sample(prompt, SAMPLES, params)

        loops.instrument(tracers, meters)
        observers, watchers = list(work.observers), list(work.watchers)
        variants: dict[str, tuple[Any, Any, bool]] = {
            "off": (tracers, meters, False),
            "on, without an SDK": (NoOpTracerProvider(), NoOpMeterProvider(), True),
            "on, kept in memory": (tracers, meters, True),
        }
        microseconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds + 1):
            for name, (tracer_provider, meter_provider, is_on) in variants.items():
                loops.instrument(tracer_provider, meter_provider)
                work.observers[:], work.watchers[:] = (observers, watchers) if is_on else ([], [])
                begun = time.process_time()
                await in_flight(sample, CALLS, at_once)
                microseconds[name].append((time.process_time() - begun) / CALLS * 1e6)
                exporter.clear()
    return {name: many[1:] for name, many in microseconds.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--in-flight", type=int, default=64)
    given = parser.parse_args()
    with serving() as url:
        measured = asyncio.run(measure(url, given.rounds, given.in_flight))
    for name, many in measured.items():
        above = statistics.median(one - off for one, off in zip(many, measured["off"], strict=True))
        print(f"{name}: {statistics.median(many):.0f} us of CPU for a sample, {above:+.0f} us")


if __name__ == "__main__":
    main()
