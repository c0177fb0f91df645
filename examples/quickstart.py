"""Teach a small language model eight invented facts, then improve its answers by trial and error.

Without an account it runs on this machine, on the embedded service. With a key the same lines run on Baseten:

    python examples/quickstart.py
    BASETEN_API_KEY=... python examples/quickstart.py Qwen/Qwen3-8B

`quickstart_sync.py` is the same without `await`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from _lessons import FACTS, YES_NO, chat, fact_example, policy_examples, rewards
from _show import Show

import loops_async as loops
from loops_local import LocalService

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@asynccontextmanager
async def connected(base_model: str, data_dir: Path | None = None) -> AsyncIterator[loops.ServiceClient]:
    """Open a session on the service that the environment names, else on an embedded one, which may keep its data.

    On the former, nothing that the program created runs on when it ends.
    """
    if os.environ.get("BASETEN_API_KEY") or os.environ.get("LOOPS_BASE_URL"):
        async with loops.ServiceClient(on_exit="deactivate") as service:
            yield service
    else:
        async with (
            LocalService(model=base_model, data_dir=data_dir) as local,
            loops.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="leave") as service,
        ):
            yield service


async def teach_facts(service: loops.ServiceClient, base_model: str, show: Show) -> None:
    """Supervised fine-tuning: make the right answers likely."""
    async with service.training_run(base_model, rank=16, seed=1, on_progress=show.provisioning) as trainer:
        tokenizer = await trainer.get_tokenizer()
        untrained = await trainer.save_weights_and_get_sampling_client("untrained")
        with show.waiting("asking before training"):
            before = await answers(untrained, tokenizer)

        examples = [fact_example(tokenizer, question, fact) for question, fact in FACTS.items()]
        for _ in show.steps("learning", 14, show.losses, "loss"):
            forward = await trainer.forward_backward(examples, "cross_entropy")  # both are sent now, in this order,
            update = await trainer.optim_step(loops.AdamParams(learning_rate=3e-3))
            show.losses.append((await forward).loss)  # and waited for here
            await update

        await (await trainer.save_state("facts"))
        trained = await trainer.save_weights_and_get_sampling_client("facts")
        show.answers(FACTS, before, after=await answers(trained, tokenizer))

        checkpoints = await service.list_checkpoints(trainer.run_id)
        show.checkpoints(checkpoints)
        adapter = next(one for one in checkpoints if one.checkpoint_id == "facts" and one.target == "sampler")
        directory = Path("demo-output", trainer.run_id, "facts")
        show.downloaded(await service.download_checkpoint(adapter.id, dest_dir=directory))


async def answers(sampler: loops.SamplingClient, tokenizer: Any) -> list[str]:
    """Ask all questions concurrently, and return the most likely answers."""
    greedy = loops.SamplingParams(max_tokens=16, temperature=0.0)
    sampled = await asyncio.gather(
        *(sampler.sample(chat(tokenizer, question), sampling_params=greedy) for question in FACTS)
    )
    return [tokenizer.decode(one.sequences[0].tokens, skip_special_tokens=True) for one in sampled]


async def reinforce(service: loops.ServiceClient, base_model: str, show: Show) -> None:
    """Policy gradient: in each step, sample answers, grade them, and make the better ones more likely."""
    async with service.training_run(base_model, rank=16, seed=1, on_progress=show.provisioning) as trainer:
        tokenizer = await trainer.get_tokenizer()
        prompts = [chat(tokenizer, f"{question} answer yes or no") for question in YES_NO]

        for step in show.steps("improving", 20, show.rewards, "reward"):
            sampler = await trainer.save_weights_and_get_sampling_client("policy")
            params = loops.SamplingParams(max_tokens=8, seed=step)
            groups = await asyncio.gather(*(sampler.sample(prompt, 4, params) for prompt in prompts))
            examples, graded = [], []
            for prompt, group, right in zip(prompts, groups, YES_NO.values(), strict=True):
                grades = rewards(tokenizer, group.sequences, right)
                examples += policy_examples(prompt, group.sequences, grades)
                graded += grades
            show.rewards.append(sum(graded) / len(graded))
            if examples:
                forward = await trainer.forward_backward(examples, "importance_sampling")
                update = await trainer.optim_step(loops.AdamParams(learning_rate=2e-4))
                await forward
                await update
        show.improvement()


async def main(base_model: str) -> int:
    """Do both; return the exit code."""
    show = Show()
    async with connected(base_model) as service:
        show.part(f"Learning facts: {base_model}")
        await teach_facts(service, base_model, show)
        show.part("Improving by trial and error")
        await reinforce(service, base_model, show)
    show.draw(Path("demo.png"))
    return show.verdict()


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else BASE_MODEL)))
    except loops.LoopsError as error:
        sys.exit(f"error: {error}")
