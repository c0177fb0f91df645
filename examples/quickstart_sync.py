"""The blocking twin of `quickstart.py`: the same job through `loops_sync`, for scripts without an event loop.

python examples/quickstart_sync.py
BASETEN_API_KEY=... python examples/quickstart_sync.py Qwen/Qwen3-8B
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _lessons import FACTS, YES_NO, chat, fact_example, policy_examples, rewards
from _show import Show

import loops_sync as loops
from loops_local import serve_in_thread

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# A call blocks its thread, so concurrent questions need one thread each.
at_once = ThreadPoolExecutor(max_workers=8)


@contextmanager
def connected(base_model: str, data_dir: Path | None = None) -> Iterator[loops.ServiceClient]:
    """Open a session on the service that the environment names, else on an embedded one, which may keep its data.

    On the former, nothing that the program created runs on when it ends.
    """
    if os.environ.get("BASETEN_API_KEY") or os.environ.get("LOOPS_BASE_URL"):
        with loops.ServiceClient(on_exit="deactivate") as service:
            yield service
    else:
        with (
            serve_in_thread(model=base_model, data_dir=data_dir) as local,
            loops.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="leave") as service,
        ):
            yield service


def teach_facts(service: loops.ServiceClient, base_model: str, show: Show) -> None:
    """Supervised fine-tuning: make the right answers likely."""
    with service.training_run(base_model, rank=16, seed=1, on_progress=show.provisioning) as trainer:
        tokenizer = trainer.get_tokenizer()
        untrained = trainer.save_weights_and_get_sampling_client("untrained")
        with show.waiting("asking before training"):
            before = answers(untrained, tokenizer)

        examples = [fact_example(tokenizer, question, fact) for question, fact in FACTS.items()]
        for _ in show.steps("learning", 14, show.losses, "loss"):
            forward = trainer.forward_backward(examples, "cross_entropy")  # both are sent now, in this order,
            update = trainer.optim_step(loops.AdamParams(learning_rate=3e-3))
            show.losses.append(forward.result().loss)  # and waited for here
            update.result()

        trainer.save_state("facts").result()
        trained = trainer.save_weights_and_get_sampling_client("facts")
        show.answers(FACTS, before, after=answers(trained, tokenizer))

        checkpoints = service.list_checkpoints(trainer.run_id)
        show.checkpoints(checkpoints)
        adapter = next(one for one in checkpoints if one.checkpoint_id == "facts" and one.target == "sampler")
        directory = Path("demo-output", trainer.run_id, "facts")
        show.downloaded(service.download_checkpoint(adapter.id, dest_dir=directory))


def answers(sampler: loops.SamplingClient, tokenizer: Any) -> list[str]:
    """Ask all questions concurrently, and return the most likely answers."""
    greedy = loops.SamplingParams(max_tokens=16, temperature=0.0)
    sampled = at_once.map(lambda question: sampler.sample(chat(tokenizer, question), sampling_params=greedy), FACTS)
    return [tokenizer.decode(one.sequences[0].tokens, skip_special_tokens=True) for one in sampled]


def reinforce(service: loops.ServiceClient, base_model: str, show: Show) -> None:
    """Policy gradient: in each step, sample answers, grade them, and make the better ones more likely."""
    with service.training_run(base_model, rank=16, seed=1, on_progress=show.provisioning) as trainer:
        tokenizer = trainer.get_tokenizer()
        prompts = [chat(tokenizer, f"{question} answer yes or no") for question in YES_NO]

        for step in show.steps("improving", 20, show.rewards, "reward"):
            sampler = trainer.save_weights_and_get_sampling_client("policy")
            params = loops.SamplingParams(max_tokens=8, seed=step)
            groups = at_once.map(lambda prompt: sampler.sample(prompt, 4, params), prompts)  # noqa: B023 - used at once
            examples, graded = [], []
            for prompt, group, right in zip(prompts, groups, YES_NO.values(), strict=True):
                grades = rewards(tokenizer, group.sequences, right)
                examples += policy_examples(prompt, group.sequences, grades)
                graded += grades
            show.rewards.append(sum(graded) / len(graded))
            if examples:
                forward = trainer.forward_backward(examples, "importance_sampling")
                update = trainer.optim_step(loops.AdamParams(learning_rate=2e-4))
                forward.result()
                update.result()
        show.improvement()


def main(base_model: str) -> int:
    """Do both; return the exit code."""
    show = Show()
    with connected(base_model) as service:
        show.part(f"Learning facts: {base_model}")
        teach_facts(service, base_model, show)
        show.part("Improving by trial and error")
        reinforce(service, base_model, show)
    show.draw(Path("demo.png"))
    return show.verdict()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else BASE_MODEL))
    except loops.LoopsError as error:
        sys.exit(f"error: {error}")
