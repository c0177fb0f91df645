"""Scripts for `tinker` that run the cookbook's own training loops, as its users write them.

Usage: python -m loops_tinker run -m tests.cookbook.programs NAME LOG_DIRECTORY STEPS

Nothing here knows of Loops: `import tinker` is whatever the path says.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import chz
import datasets
from tinker_cookbook import renderers
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.types import Comparison, LabeledComparison
from tinker_cookbook.recipes import rl_loop, sl_loop
from tinker_cookbook.rl import train as rl_train
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, RLDatasetBuilder
from tinker_cookbook.supervised import train as supervised_train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.tokenizer_utils import get_tokenizer, register_tokenizer

from loops_local.engine import byte_tokenizer

MODEL = "Qwen/Qwen3-8B-Base"
"""A name that the cookbook knows; the service has its model `tiny` under it."""
RENDERER = "role_colon"
RANK = 32
LONGEST = 1024
QUESTION = "How many?"
SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."

STRAWBERRY = (
    "Let's spell the word out and number all the letters: 1) s 2) t 3) r 4) a 5) w 6) b 7) e 8) r 9) r 10) y. "
    "We have r's at positions 3, 8, and 9. \\boxed{3}"
)
"""An answer in the prompt of `recipes.rl_loop`."""


def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as directory:
        byte_tokenizer.write(Path(directory))
        return PreTrainedTokenizerFast.from_pretrained(directory)


register_tokenizer(MODEL, tokenizer)


# --- supervised training ---


def common(batch_size: int) -> ChatDatasetBuilderCommonConfig:
    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=MODEL,
        renderer_name=RENDERER,
        max_length=LONGEST,
        batch_size=batch_size,
        train_on_what=renderers.TrainOnWhat.LAST_ASSISTANT_MESSAGE,
    )


def conversations(count: int) -> list[dict[str, Any]]:
    """What `recipes.rl_loop` asks, answered with one of two digits in a box: the form can be learned, and no more."""
    asked = [
        {"role": "user", "content": "How many r's are in strawberry?" + SUFFIX},
        {"role": "assistant", "content": STRAWBERRY},
        {"role": "user", "content": QUESTION + SUFFIX},
    ]
    answers = (f"\\boxed{{{7 if index % 2 else 3}}}" for index in range(count))
    return [{"messages": [*asked, {"role": "assistant", "content": answer}]} for answer in answers]


def supervised(log_path: str, steps: int) -> None:
    file = Path(log_path).with_suffix(".jsonl")
    file.write_text("\n".join(map(json.dumps, conversations(8 * steps))))
    config = supervised_train.Config(
        log_path=log_path,
        model_name=MODEL,
        recipe_name="judge",
        renderer_name=RENDERER,
        dataset_builder=FromConversationFileBuilder(file_path=str(file), test_size=8, common_config=common(8)),
        learning_rate=1e-2,
        lr_schedule="constant",
        lora_rank=RANK,
        save_every=5,
        eval_every=10,
        max_steps=steps - 1,
    )
    asyncio.run(supervised_train.main(config))


def sl(log_path: str, steps: int) -> None:
    sl_loop.main(
        sl_loop.Config(
            log_path=log_path,
            model_name=MODEL,
            batch_size=8,
            learning_rate=1e-2,
            max_length=LONGEST,
            lora_rank=RANK,
            save_every=5,
            max_steps=steps,
        )
    )


# --- reinforcement learning ---


class Letters(ProblemEnv):
    """The reward is the share of small letters in the answer."""

    def get_question(self) -> str:
        return "Letters!"

    def check_answer(self, sample_str: str) -> Any:
        return sum(each.islower() and each.isascii() for each in sample_str) / max(len(sample_str), 1)

    def check_format(self, sample_str: str) -> bool:
        return True

    def get_reference_answer(self) -> str:
        return "abc"


class MakeLetters:
    def __call__(self) -> Letters:
        return Letters(renderers.get_renderer(RENDERER, get_tokenizer(MODEL)), format_coef=0.0)


class LettersDataset(RLDataset):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [ProblemGroupBuilder(MakeLetters(), num_envs=8) for _ in range(4)]

    def __len__(self) -> int:
        return self.batches


@chz.chz
class LettersBuilder(RLDatasetBuilder):
    batches: int

    async def __call__(self) -> tuple[LettersDataset, None]:
        return LettersDataset(self.batches), None


def rl_config(log_path: str, steps: int, **more: Any) -> rl_train.Config:
    return rl_train.Config(
        log_path=log_path,
        model_name=MODEL,
        recipe_name="judge",
        renderer_name=RENDERER,
        dataset_builder=LettersBuilder(batches=steps),
        learning_rate=1e-2,
        max_tokens=12,
        lora_rank=RANK,
        save_every=5,
        eval_every=0,
        num_groups_to_log=1,
        **more,
    )


def rl_sync(log_path: str, steps: int) -> None:
    asyncio.run(rl_train.main(rl_config(log_path, steps)))


def rl_async(log_path: str, steps: int) -> None:
    behind = rl_train.AsyncConfig(max_steps_off_policy=2, groups_per_batch=4, loss_fn="ppo")
    asyncio.run(rl_train.main(rl_config(log_path, steps, async_config=behind)))


def rl_stream(log_path: str, steps: int) -> None:
    streamed = rl_train.StreamMinibatchConfig(groups_per_batch=4, num_minibatches=2)
    asyncio.run(rl_train.main(rl_config(log_path, steps, stream_minibatch_config=streamed)))


def rl_workers(log_path: str, steps: int) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as workers:
        asyncio.run(rl_train.main(rl_config(log_path, steps), rollout_executor=workers))


def rl(log_path: str, steps: int) -> None:
    rl_loop.main(
        rl_loop.Config(
            log_path=log_path,
            model_name=MODEL,
            batch_size=4,
            group_size=8,
            learning_rate=2e-3,
            lora_rank=RANK,
            save_every=5,
            max_tokens=16,
            loss_fn="importance_sampling",
            max_steps=steps,
        )
    )


# --- preferences ---


@chz.chz
class Comparisons(ComparisonDatasetBuilder):
    count: int

    def get_train_and_test_datasets(self) -> tuple[datasets.Dataset, None]:
        return datasets.Dataset.from_list([{"question": f"Which, {index}?"} for index in range(self.count)]), None

    def example_to_labeled_comparison(self, example: dict[str, Any]) -> LabeledComparison:
        comparison = Comparison(
            prompt_conversation=[{"role": "user", "content": example["question"]}],
            completion_A=[{"role": "assistant", "content": "the good one"}],
            completion_B=[{"role": "assistant", "content": "THE BAD ONE"}],
        )
        return LabeledComparison(comparison=comparison, label="A")


def dpo(log_path: str, steps: int) -> None:
    train_dpo.main(
        train_dpo.Config(
            log_path=log_path,
            model_name=MODEL,
            recipe_name="judge",
            renderer_name=RENDERER,
            dataset_builder=DPODatasetBuilderFromComparisons(
                comparison_builder=Comparisons(count=4 * steps), common_config=common(4)
            ),
            learning_rate=1e-3,
            lr_schedule="constant",
            lora_rank=RANK,
            save_every=5,
            eval_every=0,
            infrequent_eval_every=0,
        )
    )


PROGRAMS: dict[str, Callable[[str, int], None]] = {
    "supervised.train": supervised,
    "recipes.sl_loop": sl,
    "rl.train": rl_sync,
    "rl.train, asynchronous": rl_async,
    "rl.train, minibatches": rl_stream,
    "rl.train, spawned workers": rl_workers,
    "recipes.rl_loop": rl,
    "preference.train_dpo": dpo,
}

if __name__ == "__main__":
    name, directory, number = sys.argv[1:]
    PROGRAMS[name](directory, int(number))
