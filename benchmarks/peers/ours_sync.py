"""`loops_sync`, from one or many threads."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

import loops_sync as loops
from benchmarks.peers.measure import MAX_TOKENS, PROMPT, SAMPLES, Clock, main


def sample(given: argparse.Namespace) -> dict[str, float]:
    """Sample `count` times from as many threads as samples are in flight."""
    with loops.ServiceClient(base_url=given.url, api_key="benchmark", on_exit="leave") as service:
        sampler = service.create_sampling_client("bench")
        prompt = loops.ModelInput.from_ints(PROMPT)
        params = loops.SamplingParams(max_tokens=MAX_TOKENS)

        def worker(_: int) -> None:
            for _ in range(max(1, given.count // given.in_flight)):
                sampler.sample(prompt, SAMPLES, params)

        with ThreadPoolExecutor(given.in_flight) as pool:
            list(pool.map(worker, range(given.in_flight)))
            clock = Clock(given)
            clock.start()
            list(pool.map(worker, range(given.in_flight)))
        return clock.stop(given.count)


if __name__ == "__main__":
    main({"sample": sample})
