"""The embedded engine beside transformers and PEFT, in CPU seconds of one process.

``python -m benchmarks.engine`` runs everything (some 15 minutes on two free cores) and saves `results/engine.json` and
`results/engine.png`. CPU time includes that of all threads, so other processes on the machine affect it little.

Both have the same weights, an adapter of rank 16 that is not merged, float32, temperature 1, and no end token, so that
all completions have their full length. What transformers cannot do at all is left empty.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from loops_async.types import AdamParams, Datum, ModelInput, SamplingParams
from loops_local.engine.base import Engine, SampleJob

from .report import COLOURS, RESULTS, machine

RANK = 16
PROMPT, COMPLETION = 40, 32
GROUP_PROMPT = 400
LONG = 8000
SHORT_COMPLETION = 64


@dataclass
class Row:
    """A measurement; less is better. `peer` None: transformers cannot do this on this machine."""

    case: str
    unit: str
    ours: float
    peer: float | None = None
    note: str = ""


def main() -> None:
    """Measure, save each result, and print all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "loops-async")
    parser.add_argument(
        "--only", default="", help="measurements whose names contain this; the others keep their saved results"
    )
    given = parser.parse_args()
    console = Console()
    bench = Bench(given.model, given.cache_dir)
    rows = {row.case: row for row in saved()}
    for name, measure in MEASUREMENTS.items():
        if given.only in name:
            for row in measure(bench):
                rows[row.case] = row
                save([*rows.values()], given.model)
                console.print(f"{row.case}: ours {row.ours:.2f}, peer {row.peer or 0:.2f} {row.unit} {row.note}")
    show(console, [*rows.values()])
    draw([*rows.values()], RESULTS / "engine.png")


class Bench:
    """The same model twice: in the engine, and in transformers with PEFT."""

    def __init__(self, model: str, cache_dir: Path) -> None:
        from loops_local.engine.pytorch.engine import TorchEngine
        from loops_local.engine.pytorch.models import load_base

        self.base = replace(load_base(model, cache_dir=cache_dir), end_tokens=frozenset())
        self.engine: Engine = TorchEngine(self.base)
        self.adapter = self.engine.trainer(RANK, seed=0).adapter()
        self.longest = min(LONG, self.engine.model.max_seq_len - 2 * SHORT_COMPLETION)

    def peer(self, *, training: bool = False) -> Any:
        """Return a copy of the plain network with an adapter of PEFT."""
        import peft
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_config(self.base.network.config, attn_implementation="sdpa")
        network.load_state_dict(self.base.network.state_dict())
        network.tie_weights()
        layers = sorted({name.rpartition(".")[2] for name in self.base.shapes})
        settings = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM")
        return peft.get_peft_model(network, settings).train(training)

    def tokens(self, count: int, seed: int) -> list[int]:
        random = np.random.default_rng(seed)
        tokens: list[int] = random.integers(100, self.engine.model.vocab_size - 100, count).tolist()
        return tokens

    def job(self, prompt: Sequence[int], samples: int, length: int) -> SampleJob:
        return SampleJob(
            prompt=ModelInput.from_ints(prompt),
            num_samples=samples,
            adapter=self.adapter,
            params=SamplingParams(max_tokens=length, seed=0),
        )

    def generate(self, network: Any, prompts: Sequence[Sequence[int]], samples: int, length: int) -> None:
        import torch

        with torch.inference_mode():
            network.generate(
                input_ids=torch.tensor(prompts),
                attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
                do_sample=True,
                top_k=0,
                num_return_sequences=samples,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=0,
            )


def cpu(what: Callable[[], object], *, times: int = 1) -> float:
    """Return the CPU seconds of all threads: the least of several runs."""
    taken = []
    for _ in range(times):
        gc.collect()
        start = time.process_time()
        what()
        taken.append(time.process_time() - start)
    return min(taken)


def sampled(
    bench: Bench, jobs: Sequence[SampleJob], *, before: Sequence[SampleJob] = (), beside: SampleJob | None = None
) -> float:
    """Return the CPU seconds of these jobs at the same time in a new sampler, after `before`, and `beside` another."""
    sampler = bench.engine.sampler()

    def run() -> None:
        futures = [sampler.submit(job) for job in jobs]
        other = sampler.submit(beside) if beside else None
        for future in futures:
            future.result()
        if other:
            other.cancel()

    try:
        for job in before:
            sampler.submit(job).result()
        return cpu(run)
    finally:
        sampler.close()


def train(bench: Bench) -> Iterator[Row]:
    """One step on 8 sequences of 128 tokens."""
    import torch

    rows, length = 8, 128
    data = [Datum(model_input=bench.tokens(length + 1, seed)) for seed in range(rows)]
    trainer = bench.engine.trainer(RANK, seed=0)

    def ours() -> None:
        trainer.forward(data, "cross_entropy", {}, backward=True)
        trainer.optim_step(AdamParams())

    network = bench.peer(training=True)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
    tokens = torch.tensor([bench.tokens(length + 1, seed) for seed in range(rows)])

    def peer() -> None:
        network(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    scale = 1000 / (rows * length)
    yield Row("train, 8 x 128", "CPU s / 1000 tokens", cpu(ours, times=3) * scale, cpu(peer, times=3) * scale)


def sample(bench: Bench) -> Iterator[Row]:
    """Different prompts at once."""
    network = bench.peer()
    for count in (1, 8, 32, 128):
        prompts = [bench.tokens(PROMPT, seed) for seed in range(count)]
        times = 3 if count == 1 else 1
        jobs = [bench.job(prompt, 1, COMPLETION) for prompt in prompts]
        ours = min(sampled(bench, jobs) for _ in range(times))
        peer = cpu(partial(bench.generate, network, prompts, 1, COMPLETION), times=times)
        scale = 1000 / (count * COMPLETION)
        yield Row(f"sample, {count} at once", "CPU s / 1000 tokens", ours * scale, peer * scale)


def groups(bench: Bench) -> Iterator[Row]:
    """Samples of one prompt, in one request and in a request each."""
    network = bench.peer()
    prompt = bench.tokens(GROUP_PROMPT, 1)
    for count, length in ((8, 8), (64, 8), (8, 32), (64, 32)):
        ours = sampled(bench, [bench.job(prompt, count, length)])
        peer = cpu(partial(bench.generate, network, [prompt], count, length))
        yield Row(f"group of {count}, {GROUP_PROMPT} + {length} tokens", "CPU s", ours, peer)
    ours = sampled(bench, [bench.job(prompt, 1, 32)] * 16)
    peer = cpu(partial(bench.generate, network, [prompt], 16, 32))
    note = "peer: num_return_sequences=16"
    yield Row(f"16 requests of one prompt, {GROUP_PROMPT} + 32 tokens", "CPU s", ours, peer, note)


def turns(bench: Bench) -> Iterator[Row]:
    """The next turn of a conversation."""
    network = bench.peer()
    first, both = bench.tokens(GROUP_PROMPT, 2), bench.tokens(GROUP_PROMPT, 2) + bench.tokens(50, 3)
    ours = sampled(bench, [bench.job(both, 1, 8)], before=[bench.job(first, 1, 1)])
    peer = cpu(partial(bench.generate, network, [both], 1, 8))
    yield Row(f"next turn, {GROUP_PROMPT} known + 50 new tokens", "CPU s", ours, peer)


def long_beside_short(bench: Bench) -> Iterator[Row]:
    """63 short completions: alone, while one of `LONG` tokens continues, and while a prompt of `LONG` is computed."""
    short = [bench.job(bench.tokens(PROMPT, seed), 1, SHORT_COMPLETION) for seed in range(63)]
    long = bench.tokens(bench.longest, 100)
    alone = sampled(bench, short)
    # The long prompt is computed before, since what is compared is the time of the steps.
    beside = sampled(bench, [bench.job(long, 1, SHORT_COMPLETION), *short], before=[bench.job(long, 1, 1)])
    new = sampled(bench, short, beside=bench.job(long, 1, SHORT_COMPLETION))
    scale = 1000 / (63 * SHORT_COMPLETION)
    memory = 64 * bench.longest * bench.base.cache_bytes / 1e9
    yield Row("63 short", "CPU s / 1000 tokens", alone * scale)
    yield Row(
        f"63 short beside one of {bench.longest} tokens",
        "CPU s / 1000 tokens",
        beside * scale,
        note=f"{alone / beside:.0%} of the throughput alone; one padded batch would take {memory:.0f} GB",
    )
    yield Row(
        f"63 short while a prompt of {bench.longest} tokens is computed",
        "CPU s / 1000 tokens",
        new * scale,
        note=f"{alone / new:.0%} of the throughput alone",
    )


def filters(bench: Bench) -> Iterator[Row]:
    """Choosing tokens for 64 rows: flat logits, which no early end of a sort would help."""
    import torch
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    from loops_local.engine.pytorch.picking import pick

    logprobs = torch.randn(64, bench.engine.model.vocab_size).log_softmax(-1)
    draws = np.random.default_rng(0).random(64).tolist()
    warpers: dict[str, tuple[SamplingParams, list[Any]]] = {
        "plain": (SamplingParams(), []),
        "top_k 50": (SamplingParams(top_k=50), [TopKLogitsWarper(50)]),
        "top_p 0.95": (SamplingParams(top_p=0.95), [TopPLogitsWarper(0.95)]),
    }
    for name, (params, steps) in warpers.items():

        def peer(steps: list[Any] = steps) -> None:
            scores = logprobs
            for step in steps:
                scores = step(None, scores)
            torch.multinomial(scores.softmax(-1), 1)

        ours = cpu(partial(pick, logprobs, [params] * 64, draws), times=7)
        yield Row(f"choose tokens of 64 rows, {name}", "CPU ms", ours * 1e3, cpu(peer, times=7) * 1e3)


MEASUREMENTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "filters": filters,
    "train": train,
    "sample": sample,
    "groups": groups,
    "turns": turns,
    "long beside short": long_beside_short,
}


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the table."""
    table = Table(title="the engine, in CPU time: less is better")
    for heading in ("case", "unit", "ours", "transformers + PEFT", "times", "note"):
        table.add_column(heading, justify="right" if heading in ("ours", "transformers + PEFT", "times") else "left")
    for row in rows:
        peer, times = ("", "") if row.peer is None else (f"{row.peer:.2f}", f"{row.peer / row.ours:.1f}")
        table.add_row(row.case, row.unit, f"{row.ours:.2f}", peer, times, row.note)
    console.print(table)


def save(rows: Sequence[Row], model: str) -> None:
    """Write the numbers."""
    import peft
    import torch
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    about = machine()
    about = {name: about[name] for name in ("date", "python", "processor")} | {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
        "model": model,
    }
    report = {"machine": about, "rows": [asdict(row) for row in rows]}
    (RESULTS / "engine.json").write_text(json.dumps(report, indent=1) + "\n")


def saved() -> list[Row]:
    """Return the results of earlier runs."""
    file = RESULTS / "engine.json"
    return [Row(**row) for row in json.loads(file.read_text())["rows"]] if file.exists() else []


def draw(rows: Sequence[Row], to: Path) -> None:
    """Draw the CPU time of transformers and PEFT, relative to ours."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row.peer is not None]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(shown) + 1.2), layout="constrained")
    ratios = [(row.peer or 0) / row.ours for row in shown]
    bars = axes.barh(range(len(shown)), ratios, color=COLOURS["published"])
    axes.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], padding=3)
    axes.axvline(1, color=COLOURS["ours"], linewidth=1.2)
    axes.set_yticks(range(len(shown)), [row.case for row in shown])
    axes.invert_yaxis()
    axes.set_xlabel("CPU time of transformers + PEFT, in multiples of the engine's (blue line)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=110)


if __name__ == "__main__":
    main()
