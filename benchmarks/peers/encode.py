"""One msgspec encode of a batch and nothing else: the reference for training batches."""

from __future__ import annotations

import argparse
import asyncio

import msgspec

from benchmarks.peers.limit import datum
from benchmarks.peers.measure import batch, main, training


def train(given: argparse.Namespace) -> dict[str, float]:
    """Encode a batch in one call."""
    data = [datum(row) for row in batch(given)]
    encode = msgspec.json.Encoder().encode

    async def call() -> None:
        encode(data)

    return {**asyncio.run(training(given, call)), "body_kb": len(encode(data)) / 1e3}


if __name__ == "__main__":
    main({"train": train})
