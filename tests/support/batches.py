"""A batch from file to file, as tests run it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from loops_async import BatchReport, BatchSettings, InputError, SamplingClient, SamplingParams
from loops_local.engine.base import SampleJob
from tests.support.colours import Colour

TWO_TOKENS = SamplingParams(max_tokens=2)

SampleFile: TypeAlias = Callable[..., Awaitable[BatchReport]]


class Batch:
    """The two files of a batch, and a call that samples one into the other."""

    def __init__(self, folder: Path, colour: Colour, sampler: SamplingClient) -> None:
        self.source, self.target = folder / "in.jsonl", folder / "out.jsonl"
        self.settings_file, self.stale = folder / "out.jsonl.settings.json", folder / "out.jsonl.stale"
        self.lock = folder / "out.jsonl.lock"
        self._sample_file: SampleFile = colour.function("sample_file")
        self.sampler = sampler
        self.settings = BatchSettings.of(sampler, sampling_params=TWO_TOKENS)

    def give(self, rows: Iterable[dict[str, Any] | str]) -> None:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        self.source.write_text("".join(f"{line}\n" for line in lines))

    async def run(self, **options: Any) -> BatchReport:
        options = {"settings": self.settings, "limit": 4} | options
        return await self._sample_file(self.sampler, self.source, self.target, **options)

    async def refuses(self, **options: Any) -> str:
        """Run the batch, which must be refused and change nothing, and return the message."""
        before = {path: path.read_bytes() for path in self.source.parent.iterdir()}
        with pytest.raises(InputError) as refused:
            await self.run(**options)
        assert {path: path.read_bytes() for path in self.source.parent.iterdir()} == before
        return str(refused.value)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.target.read_bytes().splitlines()]

    def by_index(self) -> dict[int, dict[str, Any]]:
        records = self.records()
        found = {record["index"]: record for record in records}
        assert len(found) == len(records)
        return found


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": [number, 7], "label": f"row {number}"} for number in range(start, start + count)]


def prompts_of(jobs: list[SampleJob]) -> Counter[int]:
    return Counter(job.prompt.to_ints()[0] for job in jobs)
