"""``loops sample``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, TypeAlias

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from .._http.endpoint import Endpoint
from .._sampling.adaptive import Adaptive
from .._session.runtime import Runtime
from ..control_plane import ControlPlane
from ..errors import (
    AuthenticationError,
    InputError,
    PermissionDeniedError,
    ProvisioningError,
    TransportError,
    UnsupportedError,
)
from ..protocol import CheckpointUri
from ..sampling import SamplingClient, Weights, sampling_client
from ..types import SampledPrompt, Sampler, SampleResponse, SamplingParams
from ._connection import FAILED, complain, fail, on_service
from ._jsonl import InputLine, count_input, finished, open_output, output_line, read_input, write_line
from ._options import AsJson
from ._show import emit, progress, show_text

SampleMany: TypeAlias = Callable[[AsyncIterator[list[int]]], AsyncIterator[SampledPrompt]]

FIRST_LIMIT: Final = 64
"""How many completions are in flight before the sampler's speed is known."""

FATAL: Final = (AuthenticationError, PermissionDeniedError, ProvisioningError, TransportError)
"""Errors that all other prompts would have, too."""


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
        Path | None, typer.Option("--input", "-i", help='JSON lines: {"prompt": text or ids} or {"messages": …}.')
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON lines; prompts that are already in it are skipped.")
    ] = None,
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

    async def work(runtime: Runtime) -> int:
        client = await _client(runtime, sampler_id, run_id, checkpoint, timeout)
        if input_file is not None:
            limit = Adaptive(initial=FIRST_LIMIT) if concurrency is None else concurrency
            sample_many = partial(client.sample_many, limit=limit, on_error="return", **options)
            return await _complete_file(client, sample_many, input_file, output_file)
        if prompt is None:
            raise InputError("PROMPT", "give a prompt, or a file of prompts with --input")
        line = InputLine(messages=[{"role": "user", "content": prompt}]) if chat else InputLine(prompt=prompt)
        emit(await client.sample(await _tokens(client, line), **options), as_json, _show_texts)
        return 0

    if failed := on_service(context, work):
        fail(f"{failed} prompts failed; run the same command again to retry only these", FAILED)


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


async def _complete_file(client: SamplingClient, sample_many: SampleMany, source: Path, target: Path | None) -> int:
    """Complete the prompts of a file that are not yet in the output, and return how many failed."""
    known = finished(target)
    numbers: list[int] = []

    async def prompts() -> AsyncIterator[list[int]]:
        for number, line in read_input(source):
            if number not in known:
                numbers.append(number)
                yield await _tokens(client, line)

    failed = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with open_output(target) as file, progress(*columns) as bar:
        task = bar.add_task("prompts", total=count_input(source), completed=len(known))
        async for result in sample_many(prompts()):
            failed += not _write(file, numbers[result.index], result)
            bar.advance(task)
    return failed


def _write(file: BinaryIO, number: int, result: SampledPrompt) -> bool:
    """Write the answer of a prompt, or report its error; return whether it has an answer."""
    if isinstance(result.error, FATAL):
        raise result.error
    if result.response is None:
        complain(f"line {number + 1}: {result.error}")
        return False
    write_line(file, output_line(number, result.response))
    return True


def _show_texts(answer: SampleResponse) -> None:
    for sequence in answer.sequences:
        show_text(sequence.text or " ".join(map(str, sequence.tokens)))


async def _tokens(client: SamplingClient, line: InputLine) -> list[int]:
    """Return the token ids of a prompt; only text needs the model's tokenizer."""
    if isinstance(line.prompt, list):
        return line.prompt
    tokenizer: Any = await client.get_tokenizer()
    if line.messages is None:
        return list(tokenizer(line.prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(line.messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])
