"""``loops sample``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .._session.runtime import Runtime
from ..errors import (
    AuthenticationError,
    InputError,
    PermissionDeniedError,
    ProvisioningError,
    TransportError,
    UnsupportedError,
)
from ..protocol import CheckpointUri
from ..sampling import SamplerTarget, SamplingClient
from ..types import SamplingParams
from ._connection import FAILED, complain, fail, run, runtime
from ._jsonl import Row, count_rows, done, finished, output, read_rows
from ._options import AsJson
from ._show import errors, show_json, show_text

HOPELESS = (AuthenticationError, PermissionDeniedError, ProvisioningError, TransportError)
"""What every other prompt would meet, too."""


def sample(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="A text to complete.")] = None,
    sampler_id: Annotated[str | None, typer.Option("--sampler", help="Ask this sampler.")] = None,
    run_id: Annotated[str | None, typer.Option("--run", help="Ask the sampler of this run.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Ask for bt://loops:<run>/sampler_weights/<name>, at its run's sampler.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    input_file: Annotated[
        Path | None, typer.Option("--input", "-i", help='JSON lines: {"prompt": text or ids} or {"messages": …}.')
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON lines; what is there already is not asked again.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many tokens; -1 from all.")] = -1,
    seed: Annotated[int | None, typer.Option(help="Makes the completions reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text to stop at; may be repeated.")] = None,
    num_samples: Annotated[int, typer.Option("-n", help="Completions of each prompt.", min=1)] = 1,
    concurrency: Annotated[int, typer.Option(help="Prompts under way at once.", min=1)] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds that one sample may take.", min=0.1)] = 300.0,
    as_json: AsJson = False,
) -> None:
    """Complete one prompt, or every line of a file: at once, and going on where it was stopped."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=[*stop] if stop else None,
    )

    async def one(client: SamplingClient, text: str) -> None:
        row = Row(messages=[{"role": "user", "content": text}]) if chat else Row(prompt=text)
        answer = await client.sample(await _tokens(client, row), num_samples, params)
        if as_json:
            show_json(answer)
            return
        for sequence in answer.sequences:
            show_text(sequence.text or " ".join(map(str, sequence.tokens)))

    async def many(client: SamplingClient, source: Path) -> int:
        known = finished(output_file)
        numbers: list[int] = []
        failed = 0

        async def prompts() -> AsyncIterator[list[int]]:
            for number, row in read_rows(source):
                if number not in known:
                    numbers.append(number)
                    yield await _tokens(client, row)

        with output(output_file) as lines, _progress() as bar:
            task = bar.add_task("prompts", total=count_rows(source), completed=len(known))
            answers = client.sample_many(
                prompts(), num_samples=num_samples, sampling_params=params, limit=concurrency, keep_errors=True
            )
            async for each in answers:
                if isinstance(each.error, HOPELESS):
                    raise each.error
                if each.response is None:
                    failed += 1
                    complain(f"line {numbers[each.index] + 1}: {each.error}")
                else:
                    lines.write(done(numbers[each.index], each.response))
                bar.advance(task)
        return failed

    async def work() -> int:
        async with runtime(context) as opened:
            client = await _client(opened, sampler_id, run_id, checkpoint, timeout)
            if input_file is not None:
                return await many(client, input_file)
            if prompt is None:
                raise InputError("PROMPT", "give a prompt, or a file of prompts with --input")
            await one(client, prompt)
            return 0

    if failed := run(work()):
        fail(f"{failed} prompts failed; run the same command again to ask for these only", FAILED)


async def _client(
    opened: Runtime, sampler_id: str | None, run_id: str | None, checkpoint: str | None, timeout: float
) -> SamplingClient:
    """Return a client of the sampler that the options mean."""
    if [sampler_id, run_id, checkpoint].count(None) != 2:
        raise InputError("sample", "give exactly one of --sampler, --run, --checkpoint")
    if sampler_id is not None:
        sampler = await opened.control_plane.get_sampler(sampler_id)
    else:
        run_id = run_id or CheckpointUri.parse(str(checkpoint), kind="sampler_weights", path="--checkpoint").run_id
        paired = (await opened.control_plane.get_run(run_id)).sampler
        if paired is None:
            raise UnsupportedError(f"run {run_id} has no sampler; make one with `loops samplers create`")
        sampler = paired
    target = SamplerTarget(
        service_url=opened.settings.base_url,
        base_url=sampler.base_url,
        base_model=sampler.base_model,
        model_id=sampler.model_id,
        deployment_id=sampler.deployment_id,
        run_id=run_id,
        sampler_id=sampler_id,
        checkpoint_path=checkpoint,
        timeout=timeout,
        is_queued=sampler.deployment_id is None,
    )
    return SamplingClient(target, opened)


async def _tokens(client: SamplingClient, row: Row) -> list[int]:
    """Return a prompt's token ids; only text needs the model's tokenizer."""
    if isinstance(row.prompt, list):
        return row.prompt
    tokenizer: Any = await client.get_tokenizer()
    if row.messages is None:
        return list(tokenizer(row.prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(row.messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
