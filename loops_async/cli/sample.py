"""``loops sample``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Annotated, Any, Final, TypeAlias

import typer
from msgspec.structs import replace
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from .._arguments import check
from .._batch.files import STANDARD, check_input
from .._batch.progress import how_far, told_each_minute
from .._batch.rows import prompt_tokens
from .._http.endpoint import Endpoint
from .._sampling.adaptive import Adaptive
from .._session.runtime import Runtime
from ..batch import BatchReport, BatchSettings, sample_file
from ..control_plane import ControlPlane
from ..errors import InputError, UnsupportedError
from ..protocol import CheckpointUri
from ..sampling import SamplingClient, Weights, sampling_client
from ..types import Sampler, SampleResponse, SamplingParams
from ._connection import FAILED, complain, fail, on_service
from ._exit_codes import UNANSWERED
from ._options import AsJson
from ._show import emit, errors, is_live, progress, show_json, show_text

Work: TypeAlias = Callable[[Runtime], Awaitable[BatchReport | None]]

FIRST_LIMIT: Final = 64
"""How many completions are in flight before the sampler's speed is known."""


def sample(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="The text to complete.")] = None,
    sampler_id: Annotated[str | None, typer.Option("--sampler", help="Use this sampler.")] = None,
    run_id: Annotated[str | None, typer.Option("--run", help="Use the sampler of this run.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Use bt://loops:<run>/sampler_weights/<name> on the sampler of its run.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")] = False,
    input_file: Annotated[
        str | None,
        typer.Option("--input", "-i", help='JSON lines: {"prompt": text or ids} or {"messages": …}; "-" reads stdin.'),
    ] = None,
    output_file: Annotated[
        str, typer.Option("--output", "-o", help="JSON lines; what is already in it is not asked again.")
    ] = STANDARD,
    max_tokens: Annotated[int, typer.Option(help="The largest number of tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many tokens; -1 from all.")] = -1,
    seed: Annotated[int | None, typer.Option(help="Makes the completions reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text to stop at; may be repeated.")] = None,
    num_samples: Annotated[int, typer.Option("-n", help="Completions per prompt.", min=1)] = 1,
    concurrency: Annotated[
        int | None, typer.Option(help="Completions in flight at once; otherwise the number that is fastest.", min=1)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one sample may take.", min=0.1)] = 300.0,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Also ask again for lines whose error would stay.")
    ] = False,
    drop_stale: Annotated[
        bool, typer.Option("--drop-stale", help="Move answers to lines that are gone to OUTPUT.stale.")
    ] = False,
    append: Annotated[
        bool, typer.Option("--append", help="Keep what the output has from other settings or another sampler.")
    ] = False,
    max_failures: Annotated[int | None, typer.Option(help="Stop when this many prompts have failed.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Complete one prompt, or every line of a file. The same command resumes an interrupted file."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=[*stop] if stop else None,
    )
    options: dict[str, Any] = {"num_samples": num_samples, "sampling_params": params}

    async def work(runtime: Runtime) -> BatchReport | None:
        check(params)
        _check_files(prompt, input_file, output_file)
        client = await _client(runtime, sampler_id, run_id, checkpoint, timeout)
        if input_file is None:
            answer = await client.sample(await _tokens(client, str(prompt), is_chat=chat), **options)
            emit(answer, as_json, _show_texts)
            return None
        settings = BatchSettings.of(client, **options)
        if sampler_id is not None:  # only the sampler itself says which checkpoint it serves
            settings = replace(settings, checkpoint_path=await client.discover_adapter_name())
        async with _progress() as on_progress:
            return await sample_file(
                client,
                input_file,
                output_file,
                settings=settings,
                limit=Adaptive(initial=FIRST_LIMIT) if concurrency is None else concurrency,
                retry_errors=retry_errors,
                drop_stale=drop_stale,
                append=append,
                max_failures=max_failures,
                on_progress=on_progress,
            )

    if (report := on_service(context, partial(_told, work))) is not None:
        if as_json and output_file != STANDARD:
            show_json(report)
        _end(report)


async def _told(work: Work, runtime: Runtime) -> BatchReport | None:
    """Do the work; if a batch stopped before its end, say how far it came, and raise what stopped it."""
    report = await work(runtime)
    if report is not None and report.stopped is not None:
        complain(how_far(report))
        raise report.stopped
    return report


def _end(report: BatchReport) -> None:
    """End the command with a code if prompts have no answer."""
    if report.retryable:
        fail(f"{how_far(report)}; run the same command again to retry {report.retryable} of them", FAILED)
    if report.failed:
        fail(f"{how_far(report)}; their errors are in the output, and --retry-errors asks again", UNANSWERED)


def _check_files(prompt: str | None, input_file: str | None, output_file: str) -> None:
    if (prompt is None) == (input_file is None):
        raise InputError("PROMPT", "give either a prompt, or a file of prompts with --input")
    if input_file is not None:
        check_input(input_file)
    elif output_file != STANDARD:
        raise InputError("--output", "is for a file of prompts, see --input; the completion of one prompt is printed")


async def _client(
    runtime: Runtime, sampler_id: str | None, run_id: str | None, checkpoint: str | None, timeout: float
) -> SamplingClient:
    """Return a client of the sampler that the options name."""
    if [sampler_id, run_id, checkpoint].count(None) != 2:
        raise InputError("sample", "give exactly one of --sampler, --run, --checkpoint")
    if checkpoint is not None:
        run_id = CheckpointUri.parse(checkpoint, kind="sampler_weights", path="--checkpoint").run_id
    plane = runtime.control_plane
    sampler = await plane.get_sampler(str(sampler_id)) if run_id is None else await _sampler_of(plane, run_id)
    endpoint = Endpoint.of_sampler(sampler, service_url=runtime.settings.base_url, run_id=run_id, timeout=timeout)
    return sampling_client(endpoint, Weights(checkpoint_path=checkpoint), runtime)


async def _sampler_of(plane: ControlPlane, run_id: str) -> Sampler:
    sampler = (await plane.get_run(run_id)).sampler
    if sampler is None:
        raise UnsupportedError(f"run {run_id} has no sampler; create one with `loops samplers create`")
    return sampler


async def _tokens(client: SamplingClient, prompt: str, *, is_chat: bool) -> list[int]:
    fields = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
    return prompt_tokens(fields, await client.get_tokenizer())


def _show_texts(answer: SampleResponse) -> None:
    for sequence in answer.sequences:
        show_text(sequence.text or " ".join(map(str, sequence.tokens)))


# --- progress ---


@asynccontextmanager
async def _progress() -> AsyncGenerator[Callable[[BatchReport], None]]:
    """Show how far a batch is: as a bar in a terminal, elsewhere as a line each minute."""
    now = BatchReport()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress(*columns) as bar:
        task = bar.add_task("prompts", total=None)

        def tell(report: BatchReport) -> None:
            nonlocal now
            now = report
            bar.update(task, total=report.rows, completed=report.answered + report.failed)

        async def latest() -> BatchReport:
            return now

        def show(line: str) -> None:
            errors.print(f"loops: {line}", style="dim", markup=False, highlight=False, soft_wrap=True)

        async with nullcontext() if is_live() else told_each_minute(latest, show):
            yield tell
