"""A trace of a step of training and of samples behind it, recorded with OpenTelemetry and drawn.

Runs on the embedded service with a tiny model; one sample is refused once, to show a retry:

    python examples/tracing.py
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import loops_async as loops
from loops_local import LocalService

BUSY = {"error": {"code": "busy", "message": "come back"}}

COLOURS = {
    "provision": "tab:purple",
    "init_trainer_server": "tab:blue",
    "forward_backward": "tab:blue",
    "optim_step": "tab:blue",
    "save_weights_for_sampler": "tab:blue",
    "text_completion": "tab:orange",
    "POST": "0.6",
    "GET": "0.6",
}
PROGRAM = "0.3"


async def work(tracers: TracerProvider, local: LocalService) -> None:
    """Train one step and sample, within two spans of the program."""
    tracer = tracers.get_tracer("examples")
    data = [
        loops.Datum(model_input=list(range(n, n + 64)), loss_fn_inputs={"target_tokens": list(range(n + 1, n + 65))})
        for n in range(16)
    ]
    async with loops.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="deactivate") as service:
        await service.create_lora_training_client("tiny")  # loads the model, which is no part of what is shown
        with tracer.start_as_current_span("train"):
            trainer = await service.create_lora_training_client("tiny", rank=8)
            step = await trainer.forward_backward(data, "cross_entropy")
            optim = await trainer.optim_step(loops.AdamParams(learning_rate=1e-3))
            await step
            await optim
            sampler = await trainer.save_weights_and_get_sampling_client("step-1")
        local.faults.answer("POST */sample", 503, BUSY, headers={"Retry-After": "0"})
        with tracer.start_as_current_span("evaluate"):
            params = loops.SamplingParams(max_tokens=48)
            await asyncio.gather(*(sampler.sample([n, n + 1], 1, params) for n in range(3)))


def draw(spans: Sequence[ReadableSpan], path: Path) -> None:
    """Draw spans as a waterfall: one row for each, below its parent."""
    mpl.use("Agg")
    rows = list(in_order(spans, None, 0))
    figure, axes = plt.subplots(figsize=(10.5, 0.8 + 0.23 * len(rows)), layout="constrained")
    start, end = min(_ms(span.start_time) for span in spans), max(_ms(span.end_time) for span in spans)
    for row, (span, depth) in enumerate(rows):
        _draw_row(axes, row, span, depth, start=start, narrowest=(end - start) / 400)
    axes.set(yticks=[], ylim=(len(rows) - 0.4, -0.6), xlabel="milliseconds", xlim=(0, (end - start) * 1.16))
    axes.set_title("Two spans of a program, and what the library did in them; a diamond is an event", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _draw_row(axes: Axes, row: int, span: ReadableSpan, depth: int, *, start: float, narrowest: float) -> None:
    begin, end = _ms(span.start_time) - start, _ms(span.end_time) - start
    is_request, is_error = span.name in ("GET", "POST"), span.status.status_code is StatusCode.ERROR
    colour = "tab:red" if is_error else COLOURS.get(span.name.split()[0], PROGRAM)
    axes.barh(row, max(end - begin, narrowest), left=begin, height=0.36 if is_request else 0.7, color=colour)
    for event in span.events:
        x = _ms(event.timestamp) - start
        axes.plot(x, row, marker="D", color="white", markeredgecolor="black", ms=3.5, zorder=3)
    beside: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
    note, shade = f"{end - begin:.0f} ms{_result(span)}", "tab:red" if is_error else "0.35"
    axes.annotate(note, (end, row), (4, 0), fontsize=7.5, color=shade, **beside)
    label, shade = f"{'    ' * depth}{_label(span)}", "0.45" if is_request else "black"
    left: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "annotation_clip": False}
    axes.annotate(label, (0, row), (-225, 0), fontsize=8.5, color=shade, **left, **beside)


def in_order(spans: Sequence[ReadableSpan], parent: int | None, depth: int) -> Iterator[tuple[ReadableSpan, int]]:
    """Yield each span behind its parent, with its depth."""
    children = [span for span in spans if (span.parent.span_id if span.parent else None) == parent]
    for span in sorted(children, key=lambda span: span.start_time or 0):
        yield span, depth
        yield from in_order(spans, span.context.span_id, depth + 1)


def _label(span: ReadableSpan) -> str:
    url = str((span.attributes or {}).get("url.full", ""))
    if not url:
        return span.name
    *_, before, last = url.split("/")
    is_id = any(character.isdigit() for character in last)
    return f"{span.name} …/{f'{before}/…' if is_id else last}"


def _result(span: ReadableSpan) -> str:
    facts: Mapping[str, Any] = span.attributes or {}
    parts = [
        str(facts.get("http.response.status_code", "")),
        f"resend {facts['http.request.resend_count']}" if "http.request.resend_count" in facts else "",
        f"{facts['loops.tokens']} tokens" if "loops.tokens" in facts else "",
        f"{facts['gen_ai.usage.output_tokens']} tokens" if "gen_ai.usage.output_tokens" in facts else "",
    ]
    return "".join(f", {part}" for part in parts if part)


def _ms(nanoseconds: int | None) -> float:
    return (nanoseconds or 0) / 1e6


async def main() -> int:
    """Record, draw, and check that all is in one of the two traces."""
    exporter, tracers = InMemorySpanExporter(), TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    loops.instrument(tracers)
    async with LocalService(model="tiny", provisioning_seconds=0.15) as local:
        await work(tracers, local)
    traces = {span.context.trace_id for span in exporter.get_finished_spans() if span.name in ("train", "evaluate")}
    spans = [span for span in exporter.get_finished_spans() if span.context.trace_id in traces]
    draw(spans, Path("tracing.png"))
    print(f"{len(spans)} spans drawn in tracing.png")
    return 0 if len(traces) == 2 else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
