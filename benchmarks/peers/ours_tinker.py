"""`loops_tinker`, from one event loop of a script."""

from __future__ import annotations

import argparse
import asyncio

import loops_tinker as tinker
from benchmarks.peers.measure import MAX_TOKENS, PROMPT, SAMPLES, main, sampling


def sample(given: argparse.Namespace) -> dict[str, float]:
    """Sample `count` times."""
    service = tinker.ServiceClient(base_url=given.url, api_key="benchmark")
    prompt = tinker.ModelInput.from_ints(PROMPT)
    params = tinker.SamplingParams(max_tokens=MAX_TOKENS)

    async def run() -> dict[str, float]:
        sampler = await service.create_sampling_client(base_model="bench")

        async def call() -> None:
            response = await sampler.sample(prompt, SAMPLES, params)
            assert len(response.sequences) == SAMPLES

        return await sampling(given, call)

    return asyncio.run(run())


if __name__ == "__main__":
    main({"sample": sample})
