"""Batches: any number of prompts, answered once each, and resumed from their own output.

A *row* is an object with ``prompt`` (text or token ids) or ``messages``, and optionally an ``id``; its other fields are
carried through. Its *record* has those, a ``key`` and the digest of the ``settings``, and an answer or an ``error``.

- `sample_file`: samples a file of JSON lines into another one; ``loops sample -i -o`` is the same.
- `sample_rows`: samples a list of rows, for engines that keep rows elsewhere.
- `BatchSettings`: what decides the answers. `row_key`: what identifies one. `BatchReport`: how far a batch is.

Example:
    ::

        settings = loops.BatchSettings.of(sampler, num_samples=4, sampling_params=params)
        report = await loops.sample_file(sampler, "prompts.jsonl", "answers.jsonl", settings=settings, limit=256)
        print(report.answered, "of", report.rows)
"""

from ._batch.file_batch import sample_file
from ._batch.report import BatchReport
from ._batch.rows import row_key
from ._batch.sampling import sample_rows
from ._batch.settings import BatchClient, BatchSettings

__all__: list[str] = ["BatchClient", "BatchReport", "BatchSettings", "row_key", "sample_file", "sample_rows"]
