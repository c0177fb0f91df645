"""What is reported to OpenTelemetry."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from opentelemetry import baggage
from opentelemetry.context import attach as set_in_this_task
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id
from opentelemetry.trace import get_tracer_provider as global_tracer_provider

import loops_async as loops
from loops_async import AdamParams, Episode, LoopsError, RolloutContext, SamplingParams, ServiceClient, TrainingClient
from loops_async._telemetry import setup
from loops_local import LocalService, serve_in_thread
from tests.support.colours import Colour
from tests.support.engines import Engines, WatchedEngine
from tests.support.held import Held
from tests.support.rollouts import PAIRS
from tests.support.telemetry import Recorded, events, facts
from tests.support.work import FEW_TOKENS, PROMPT, REFUSED, eventually, example, run_python

BUSY = {"error": {"code": "busy", "message": "the content was 4711"}}


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    recorded = Recorded()
    recorded.begin()
    yield recorded
    recorded.end()


def is_failure(span: ReadableSpan) -> bool:
    return span.status.status_code is StatusCode.ERROR


async def test_a_sample_is_a_span_with_its_settings_and_its_usage(
    recorded: Recorded, service: ServiceClient, local: LocalService, trainer: TrainingClient, engine: WatchedEngine
) -> None:
    sampler = await trainer.save_weights_and_get_sampling_client("one")
    params = SamplingParams(max_tokens=4, temperature=0.5, top_p=0.9, top_k=7, seed=3)
    with recorded.tracer.start_as_current_span("caller"):
        response = await sampler.sample(PROMPT, 2, params)
    span = recorded.one(f"text_completion {engine.name}")
    assert span.kind is SpanKind.CLIENT
    assert facts(span) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "baseten",
        "gen_ai.request.model": engine.name,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": response.request_id,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": len(PROMPT),
        "gen_ai.usage.output_tokens": 8,
        "server.address": "127.0.0.1",
        "server.port": urlsplit(local.base_url).port,
        "loops.run_id": trainer.run_id,
        "loops.sampler_id": sampler.sampler_id,
        "loops.policy_version": 0,
    }
    caller = recorded.one("caller")
    assert span.parent == caller.context
    *gate, request = recorded.children(span)
    assert {each.name for each in gate} == {"GET"}  # whether the sampler is ready
    assert (request.name, request.kind) == ("POST", SpanKind.CLIENT)
    assert facts(request) == {
        "http.request.method": "POST",
        "url.full": facts(request)["url.full"],
        "http.response.status_code": 200,
        "loops.request_id": response.request_id,
    }
    assert facts(request)["url.full"].startswith(local.base_url)
    assert facts(request)["url.full"].endswith("/sample")
    assert not any(map(is_failure, recorded.all()))


async def test_an_operation_is_a_span_until_its_outcome(
    recorded: Recorded, trainer: TrainingClient, engine: WatchedEngine
) -> None:
    engine.training.clear()
    with recorded.tracer.start_as_current_span("caller") as caller:
        step = await trainer.forward_backward([example(1), example(2)])
        optim = await trainer.optim_step(AdamParams())
    assert recorded.named("forward_backward") == []
    engine.training.set()
    await asyncio.gather(step, optim)
    await (await trainer.forward([example()]))
    saved = await (await trainer.save_state("here"))
    await (await trainer.load_state(saved.path))
    span = recorded.one(f"forward_backward {engine.name}")
    assert span.kind is SpanKind.CLIENT
    assert facts(span) == {
        "loops.operation.name": "forward_backward",
        "loops.operation.id": step.operation_id,
        "loops.run_id": trainer.run_id,
        "loops.datums": 2,
        "loops.tokens": 6,
        "loops.loss_fn": "cross_entropy",
    }
    assert events(span) == ["accepted"]
    assert span.parent == caller.get_span_context()
    assert {"POST", "GET"} == {child.name for child in recorded.children(span)}
    short = recorded.one(f"optim_step {engine.name}")
    assert facts(short) == {
        "loops.operation.name": "optim_step",
        "loops.operation.id": optim.operation_id,
        "loops.run_id": trainer.run_id,
    }
    assert short.parent == caller.get_span_context()
    for name in ("forward", "save_state", "load_state"):
        assert recorded.one(f"{name} {engine.name}").parent is None
    assert not any(map(is_failure, recorded.all()))


async def test_provisioning_has_an_event_for_each_stage(
    recorded: Recorded, service: ServiceClient, engine: WatchedEngine
) -> None:
    with recorded.tracer.start_as_current_span("caller") as caller:
        trainer = await service.create_lora_training_client(engine.name)
        sampler = await service.create_sampling_client(engine.name)
    run, alone = recorded.one("provision run"), recorded.one("provision sampler")
    assert facts(run) == {"loops.run_id": trainer.run_id}
    assert facts(alone) == {"loops.sampler_id": sampler.sampler_id}
    for span in (run, alone):
        assert (span.kind, span.parent) == (SpanKind.INTERNAL, caller.get_span_context())
        assert (events(span)[0], events(span)[-1]) == ("created", "ready")
    assert "RUNNING" in events(run)
    below = recorded.children(run)
    assert f"init_trainer_server {engine.name}" in [span.name for span in below]
    assert next(facts(span)["url.full"] for span in below if span.name == "POST").endswith("/runs")


async def test_a_download_sends_its_trace_to_the_service_only(
    recorded: Recorded, service: ServiceClient, trainer: TrainingClient, local: LocalService, tmp_path: Path
) -> None:
    await (await trainer.save_state("here"))
    (checkpoint,) = await service.list_checkpoints(trainer.run_id)
    listing = local.faults.watch("GET */checkpoints/*/files")
    files = local.faults.watch("GET */files/*", times=9)
    with recorded.tracer.start_as_current_span("caller") as caller:
        await service.download_checkpoint(checkpoint.id, dest_dir=tmp_path)
    span = recorded.one("download_checkpoint")
    assert (span.kind, span.parent) == (SpanKind.INTERNAL, caller.get_span_context())
    assert facts(span) == {"loops.checkpoint_id": checkpoint.id}
    assert events(span) == ["listed", "fetched", "complete"]
    below = recorded.children(span)
    assert len(below) == 1 + len(files)
    assert len(files) > 1
    assert listing[0].headers["traceparent"].split("-")[2] == format_span_id(below[0].context.span_id)
    assert all(file.query for file in files)
    assert not any("traceparent" in file.headers for file in files)
    assert not any("?" in facts(each)["url.full"] for each in below)


async def test_the_service_hears_of_the_span_of_each_request(
    recorded: Recorded, service: ServiceClient, local: LocalService, engine: WatchedEngine
) -> None:
    seen = local.faults.watch("* *", times=1000)
    set_in_this_task(baggage.set_baggage("user", "of the program"))
    with recorded.tracer.start_as_current_span("caller") as caller:
        trainer = await service.create_lora_training_client(engine.name)
        await (await trainer.forward_backward([example()]))
        sampler = await trainer.save_weights_and_get_sampling_client("one")
        await sampler.sample(PROMPT, 1, FEW_TOKENS)
    trace = format_trace_id(caller.get_span_context().trace_id)
    told = {tuple(request.headers["traceparent"].split("-")[1:3]) for request in seen}
    requests = [*recorded.named("GET"), *recorded.named("POST")]
    assert told == {(trace, format_span_id(span.context.span_id)) for span in requests}
    routes = {request.path.split("/")[1] for request in seen}
    assert {"v1", "trainers", "samplers"} <= routes  # control plane, trainer and sampler
    assert not any("baggage" in request.headers for request in seen)


async def test_requests_that_are_part_of_nothing_make_no_traces(
    recorded: Recorded, service: ServiceClient, local: LocalService
) -> None:
    seen = local.faults.watch("GET */capabilities", times=2)
    await service.get_server_capabilities()
    assert recorded.all() == ()
    with recorded.tracer.start_as_current_span("caller") as caller:
        await service.get_server_capabilities()
    assert recorded.one("GET").parent == caller.get_span_context()
    assert ["traceparent" in request.headers for request in seen] == [False, True]


async def test_a_queued_sample_is_a_span_with_its_polls(recorded: Recorded, colour: Colour, engines: Engines) -> None:
    with serve_in_thread(engine=engines, serverless=True, provisioning_seconds=0.0, poll_hold_seconds=0.02) as local:
        async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
            engine = engines("queued")
            sampler = await service.create_sampling_client(engine.name)
            engine.hold_samples()
            polls = local.faults.watch("GET */operations/*", times=1000)

            async def release() -> None:
                await eventually(lambda: len(polls) > 1)
                engine.release_samples()

            with recorded.tracer.start_as_current_span("caller") as caller:
                await asyncio.gather(sampler.sample(PROMPT, 1, FEW_TOKENS), release())
    span = recorded.one("text_completion queued")
    assert span.parent == caller.get_span_context()
    assert events(span) == ["accepted"]
    submitted, *polled = recorded.children(span)
    assert (submitted.name, {each.name for each in polled}) == ("POST", {"GET"})
    assert [facts(each)["http.response.status_code"] for each in polled] == [408] * (len(polled) - 1) + [200]
    assert not any(map(is_failure, polled))


async def test_a_retry_is_a_request_of_its_own(
    recorded: Recorded, service: ServiceClient, local: LocalService, engine: WatchedEngine
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    local.faults.answer("POST */sample", 503, BUSY, headers={"Retry-After": "0"}, times=2)
    await sampler.sample(PROMPT, 1, FEW_TOKENS)
    span = recorded.one(f"text_completion {engine.name}")
    assert events(span) == ["retry", "retry"]
    assert not is_failure(span)
    requests = recorded.children(span)
    assert [facts(each).get("http.request.resend_count") for each in requests] == [None, 1, 2]
    assert [facts(each).get("error.type") for each in requests] == ["503", "503", None]
    assert [is_failure(each) for each in requests] == [True, True, False]
    assert [(group, point.value) for group, point in recorded.points("loops.client.retries")] == [
        ({"loops.kind": "sample"}, 2)
    ]


async def test_a_connection_that_breaks_is_an_error_of_its_request(
    recorded: Recorded, service: ServiceClient, local: LocalService, trainer: TrainingClient, engine: WatchedEngine
) -> None:
    local.faults.drop("POST */optim_step")
    await (await trainer.optim_step(AdamParams()))
    lost, sent, *_ = recorded.children(recorded.one(f"optim_step {engine.name}"))
    assert (facts(lost)["error.type"], "http.response.status_code" in facts(lost)) == ("ConnectError", False)
    assert facts(sent)["http.request.resend_count"] == 1


async def test_a_failure_is_named_and_not_quoted(
    recorded: Recorded, service: ServiceClient, local: LocalService, trainer: TrainingClient, engine: WatchedEngine
) -> None:
    with pytest.raises(loops.RemoteOpError):
        await (await trainer.forward_backward([REFUSED]))
    await eventually(lambda: recorded.named("forward_backward"))
    failed = recorded.one(f"forward_backward {engine.name}")
    assert facts(failed)["error.type"] == "RemoteOpError"
    sampler = await trainer.save_weights_and_get_sampling_client("one")
    local.faults.answer("POST */sample", 422, BUSY)
    with pytest.raises(LoopsError):
        await sampler.sample(PROMPT, 1, FEW_TOKENS)
    refused = recorded.one(f"text_completion {engine.name}")
    assert facts(refused)["error.type"] == "BadRequestError"
    assert "gen_ai.usage.output_tokens" not in facts(refused)
    for span in (failed, refused):
        assert is_failure(span)
        assert span.status.description is None
    ((group, _),) = recorded.points("gen_ai.client.operation.duration")
    assert group["error.type"] == "BadRequestError"


async def test_what_is_cancelled_ends(
    recorded: Recorded, colour: Colour, service: ServiceClient, trainer: TrainingClient, engine: WatchedEngine
) -> None:
    sampler = await trainer.save_weights_and_get_sampling_client("one")
    engine.hold_samples()
    future = await asyncio.to_thread(colour.module.start, colour.own(sampler).sample, PROMPT, 1, FEW_TOKENS)
    await eventually(lambda: engine.waiting_samples == 1)
    assert recorded.named("text_completion") == []
    future.cancel()
    await eventually(lambda: recorded.named("text_completion"))
    (span,) = recorded.named("text_completion")
    assert facts(span)["error.type"] == "CancelledError"
    assert is_failure(span)
    request = recorded.children(span)[-1]
    assert (request.name, facts(request)["error.type"]) == ("POST", "CancelledError")
    await eventually(lambda: {point.value for _, point in recorded.points("loops.client.in_flight")} == {0})


async def test_an_operation_that_is_cancelled_before_its_turn_ends(
    recorded: Recorded,
    colour: Colour,
    service: ServiceClient,
    trainer: TrainingClient,
    local: LocalService,
    engine: WatchedEngine,
) -> None:
    held = Held(local.faults, f"POST */{trainer.run_id}/forward_backward")
    start, own = colour.module.start, colour.own(trainer)
    first = await asyncio.to_thread(start, own.forward_backward, [example()])
    await eventually(lambda: len(held.arrived) == 1)
    second = await asyncio.to_thread(start, own.optim_step, AdamParams())
    await eventually(lambda: [each.waiting_for for each in service.inflight() if each.what == "optim_step"] == ["turn"])
    second.cancel()
    await eventually(lambda: recorded.named("optim_step"))
    held.let_go()
    await first
    assert facts(recorded.one(f"optim_step {engine.name}")) == {
        "loops.operation.name": "optim_step",
        "loops.run_id": trainer.run_id,
        "error.type": "CancelledError",
    }


async def test_a_started_call_is_below_the_span_of_its_thread(
    recorded: Recorded, colour: Colour, trainer: TrainingClient, engine: WatchedEngine
) -> None:
    def start() -> Any:
        with recorded.tracer.start_as_current_span("thread"):
            return colour.module.start(colour.own(trainer).forward_backward, [example()])

    future = await asyncio.to_thread(start)
    await future
    assert recorded.one(f"forward_backward {engine.name}").parent == recorded.one("thread").context


async def test_many_samples_are_below_the_span_of_their_loop(
    recorded: Recorded, service: ServiceClient, engine: WatchedEngine
) -> None:
    sampler = await service.create_sampling_client(engine.name)
    with recorded.tracer.start_as_current_span("caller") as caller:
        async for _ in sampler.sample_many([PROMPT] * 5, sampling_params=FEW_TOKENS, limit=2):
            pass
    samples = recorded.named("text_completion")
    assert [span.parent for span in samples] == [caller.get_span_context()] * 5
    assert all(len(recorded.children(span)) == 1 for span in samples)


async def test_samples_of_rollouts_are_below_the_spans_of_the_rollouts(
    recorded: Recorded, trainer: TrainingClient
) -> None:
    async def rollout(ctx: RolloutContext, task: int) -> Episode:
        episode = Episode.start([task + 1, 20])
        with recorded.tracer.start_as_current_span("rollout"):
            await ctx.sample(episode, FEW_TOKENS)
        episode.reward = float(ctx.member)
        return episode

    async with trainer.rollouts(rollout, range(2), **PAIRS) as stream:
        await anext(stream)
    rollouts = recorded.named("rollout")
    assert len(rollouts) == 4
    for span in rollouts:
        (sample,) = recorded.children(span)
        assert sample.name.startswith("text_completion")


async def test_calls_are_counted_and_timed(
    recorded: Recorded, service: ServiceClient, local: LocalService, trainer: TrainingClient, engine: WatchedEngine
) -> None:
    sampler = await trainer.save_weights_and_get_sampling_client("one")
    engine.hold_samples()
    asked = asyncio.gather(*(sampler.sample(PROMPT, 1, FEW_TOKENS) for _ in range(3)))
    await eventually(lambda: engine.waiting_samples == 3)
    flying = {group["loops.kind"]: point.value for group, point in recorded.points("loops.client.in_flight")}
    assert flying["sample"] == 3
    engine.release_samples()
    await asked
    await (await trainer.optim_step(AdamParams()))
    group = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "baseten",
        "gen_ai.request.model": engine.name,
        "server.address": "127.0.0.1",
        "server.port": urlsplit(local.base_url).port,
    }
    ((seen, duration),) = recorded.points("gen_ai.client.operation.duration")
    assert (seen, duration.count) == (group, 3)
    assert duration.explicit_bounds[:2] == (0.01, 0.02)
    usage = {seen["gen_ai.token.type"]: (seen, point) for seen, point in recorded.points("gen_ai.client.token.usage")}
    assert usage["input"][0] == group | {"gen_ai.token.type": "input"}
    assert (usage["input"][1].sum, usage["output"][1].sum) == (3 * len(PROMPT), 12)
    timed = {
        seen["loops.operation.name"]: point.count for seen, point in recorded.points("loops.client.operation.duration")
    }
    assert timed["optim_step"] == 1
    await eventually(lambda: {point.value for _, point in recorded.points("loops.client.in_flight")} == {0})

    return "loops.client.operation.duration"


async def test_neither_content_nor_secrets_are_recorded(
    recorded: Recorded, service: ServiceClient, local: LocalService, trainer: TrainingClient, tmp_path: Path
) -> None:
    prompt, stop = [471147, 471148], "never-4711"
    with recorded.tracer.start_as_current_span("caller"):
        await (await trainer.forward_backward([example(471149)]))
        saved = await (await trainer.save_state("here"))
        await (await trainer.load_state(saved.path))
        (checkpoint,) = await service.list_checkpoints(trainer.run_id)
        files = local.faults.watch("GET */files/*", times=9)
        await service.download_checkpoint(checkpoint.id, dest_dir=tmp_path)
        sampler = await trainer.save_weights_and_get_sampling_client("one")
        response = await sampler.sample(prompt, 1, SamplingParams(max_tokens=4, stop=stop))
        echo = {"error": {"code": local.api_key, "message": f"{prompt} {stop} {local.api_key}"}}
        local.faults.answer("POST */sample", 503, echo, headers={"Retry-After": "0", "X-Request-Id": local.api_key})
        local.faults.answer("POST */sample", 422, echo)
        with pytest.raises(LoopsError):
            await sampler.sample(prompt, 1, FEW_TOKENS)
    text = recorded.text()
    assert "text_completion" in text
    assert len(files) > 1
    for secret in (stop, local.api_key, *(file.query_string for file in files)):
        assert secret not in text
    (completion,) = response.sequences
    for number in (*prompt, 471149, *completion.tokens, *completion.logprobs):
        assert not re.search(rf"(?<![\w.]){re.escape(str(number))}(?!\w)", text)


async def test_a_program_whose_exporter_fails_goes_on(
    recorded: Recorded, service: ServiceClient, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    failure = type(f"FullDiskOf{engine.name}", (Exception,), {})  # the first one of each kind is a warning

    class Fails(SpanProcessor):
        def on_start(self, *_: object, **__: object) -> None:
            raise failure

        def on_end(self, span: ReadableSpan) -> None:
            raise failure

    recorded.tracers.add_span_processor(Fails())
    sampler = await service.create_sampling_client(engine.name)
    for _ in range(3):
        assert (await sampler.sample(PROMPT, 1, FEW_TOKENS)).sequences
    await eventually(lambda: service.inflight() == [])
    warnings = [record for record in caplog.records if "OpenTelemetry failed" in record.getMessage()]
    assert len(warnings) == 1


async def test_a_client_that_is_open_is_reported_and_the_providers_can_be_changed(
    colour: Colour, local: LocalService, engine: WatchedEngine
) -> None:
    first, second = Recorded(), Recorded()
    async with colour.connected(base_url=local.base_url, api_key=local.api_key) as service:
        sampler = await service.create_sampling_client(engine.name)
        first.begin()
        await sampler.sample(PROMPT, 1, FEW_TOKENS)
        colour.module.instrument(second.tracers, second.meters)
        await sampler.sample(PROMPT, 1, FEW_TOKENS)
    first.end()
    second.end()
    for each in (first, second):
        assert len(each.named("text_completion")) == 1


async def test_the_request_log_shows_the_header_that_is_sent(
    recorded: Recorded, colour: Colour, local: LocalService, tmp_path: Path
) -> None:
    file, seen = tmp_path / "requests.jsonl", local.faults.watch("GET */capabilities")
    async with colour.connected(base_url=local.base_url, api_key=local.api_key, request_log=file) as service:
        with recorded.tracer.start_as_current_span("caller"):
            await service.get_server_capabilities()
    assert f'"traceparent":"{seen[0].headers["traceparent"]}"' in file.read_text().replace('": "', '":"')


SCRIPT = """
import sys
import loops_async, loops_sync
print("imported:", any(name.split(".")[0] == "opentelemetry" for name in sys.modules))
if "opentelemetry" in sys.modules:
    from opentelemetry import metrics, trace
    print(type(trace.get_tracer_provider()).__name__, type(metrics.get_meter_provider()).__name__)
"""


async def test_importing_us_imports_no_opentelemetry_unless_it_is_asked_for() -> None:
    off, on = await asyncio.gather(run_python(SCRIPT, LOOPS_OTEL=""), run_python(SCRIPT, LOOPS_OTEL="1"))
    assert off.split() == ["imported:", "False"]
    assert on.split() == ["imported:", "True", "ProxyTracerProvider", "_ProxyMeterProvider"]


def test_without_the_package_the_error_names_the_extra_and_the_variable_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry", None)
    with pytest.raises(ImportError, match=r"loops-async\[otel\]"):
        loops.instrument()
    monkeypatch.setenv("LOOPS_OTEL", "1")
    setup.instrument_as_the_environment_says()
    (warning,) = caplog.records
    assert "pip install 'loops-async[otel]'" in warning.getMessage()


@pytest.mark.parametrize(("given", "warnings"), [("", 0), ("0", 0), ("yes", 1)])
def test_the_variable_is_1_or_0(
    given: str, warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOOPS_OTEL", given)
    setup.instrument_as_the_environment_says()
    assert len([one for one in caplog.records if "LOOPS_OTEL must be 1 or 0" in one.getMessage()]) == warnings


async def test_nothing_global_is_installed(recorded: Recorded, service: ServiceClient, engine: WatchedEngine) -> None:
    before = global_tracer_provider()
    sampler = await service.create_sampling_client(engine.name)
    await sampler.sample(PROMPT, 1, FEW_TOKENS)
    assert global_tracer_provider() is before
    assert recorded.named("text_completion")
