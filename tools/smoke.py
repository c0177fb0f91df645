"""Use an installed loops-async as a new user would, with only its own dependencies.

Run it outside the source tree: python tools/smoke.py
"""

from __future__ import annotations

import asyncio
import os
import sys
import urllib.request

import loops_async
import loops_local
import loops_sync

PROMPT = [104, 105]
SCRIPTS = ("script", "overview", "run", "tables", "cards", "charts", "dom", "format")


def message_without_key() -> str:
    """Return what the client says when it has no key."""
    try:
        loops_async.ServiceClient()
    except loops_async.ConfigError as error:
        return str(error)
    return ""


async def sample_async(local: loops_local.LocalService) -> list[int]:
    """Train one step and sample."""
    async with loops_async.ServiceClient(
        base_url=local.base_url, api_key=local.api_key, on_exit="deactivate"
    ) as service:
        trainer = await service.create_lora_training_client("any", rank=8)
        await (await trainer.optim_step(loops_async.AdamParams())).result()
        sampler = await trainer.save_weights_and_get_sampling_client("step-1")
        answer = await sampler.sample(PROMPT, sampling_params=loops_async.SamplingParams(max_tokens=4))
        return answer.sequences[0].tokens


def sample_blocking(local: loops_local.LocalService) -> list[int]:
    """Do the same without `await`."""
    with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="deactivate") as service:
        trainer = service.create_lora_training_client("any", rank=8)
        trainer.optim_step(loops_sync.AdamParams()).result()
        sampler = trainer.save_weights_and_get_sampling_client("step-1")
        answer = sampler.sample(PROMPT, sampling_params=loops_sync.SamplingParams(max_tokens=4))
        return answer.sequences[0].tokens


def look_at_dashboard(local: loops_local.LocalService) -> None:
    """Load the page of the dashboard and what it names: these files are no Python, so a build could forget them."""
    browser = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the service is on this machine
    for name in ("", "/style.css", *(f"/{name}.js" for name in SCRIPTS), "/icon.svg"):
        with browser.open(f"{local.base_url}/dashboard{name}") as answer:
            assert len(answer.read()) > 100, name


def main() -> None:
    """Run all checks."""
    for name in ("BASETEN_API_KEY", "LOOPS_BASE_URL"):
        os.environ.pop(name, None)
    message = message_without_key()
    assert "BASETEN_API_KEY" in message, message
    assert "loops-local serve" in message, message
    with loops_local.serve_in_thread(engine="echo") as local:
        tokens = asyncio.run(sample_async(local))
        assert len(tokens) == 4, tokens
        assert sample_blocking(local) == tokens
        look_at_dashboard(local)
    heavy = {"numpy", "torch", "transformers", "tokenizers"} & sys.modules.keys()
    assert not heavy, f"imported unnecessarily: {heavy}"
    print(f"loops-async {loops_async.__version__} served, trained and sampled, async and blocking: tokens {tokens}")


if __name__ == "__main__":
    main()
