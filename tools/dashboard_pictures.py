"""Draw the pictures of the dashboard in docs/: train two runs beside each other for a minute, and look at the page.

Needs the torch engine, playwright and Debian's Chromium (`apt-get install chromium`).

Usage: python tools/dashboard_pictures.py [OUT]
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402 - found in ROOT
from playwright.sync_api import sync_playwright

import loops_sync as loops
from loops_local import LocalService, serve_in_thread

SECONDS: Final = 60.0
PUBLISHED_EVERY: Final = 50
RATES: Final = {"addition, rate 1e-3": 1e-3, "addition, rate 1e-4": 1e-4}
DIGITS: Final = frozenset(b"0123456789")
FLAGS: Final = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SIZES: Final = {"dashboard": (1120, 715), "dashboard_run": (1120, 815)}


def main() -> None:
    """Train, and write the pictures into OUT, docs/ by default."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs"
    with (
        serve_in_thread(engine="torch", model="tiny", provisioning_seconds=0.0) as local,
        loops.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="deactivate") as service,
        ThreadPoolExecutor(len(RATES)) as threads,
    ):
        trainers = [service.create_lora_training_client("tiny", rank=8, seed=1, name=name) for name in RATES]
        working = [threads.submit(train, *each) for each in zip(trainers, RATES.values(), strict=True)]
        time.sleep(SECONDS)
        draw(local, trainers[0].run_id, out)
        for each in working:
            each.result()


def train(trainer: Any, rate: float) -> None:
    """Teach additions for a little more than the minute; the reward is the share of digits in sampled answers."""
    picking, until, step = random.Random(1), time.monotonic() + SECONDS + 10, 0
    while time.monotonic() < until:
        step += 1
        batch = [example(picking.randint(0, 49), picking.randint(0, 49)) for _ in range(8)]
        if step % PUBLISHED_EVERY == 1:  # also before the first step, to have a sampler
            sampler = trainer.save_weights_and_get_sampling_client(f"step-{step}")
        answer = sampler.sample(tokens("2+2="), 16, loops.SamplingParams(max_tokens=2))
        right = [token in DIGITS for sequence in answer.sequences for token in sequence.tokens]
        trainer.log({"reward": sum(right) / len(right)})
        trainer.step(batch, "cross_entropy", loops.AdamParams(learning_rate=rate)).result()
        time.sleep(0.1)


def example(first: int, second: int) -> loops.Datum:
    """Return an addition, of which the sum is learned."""
    question, answer = tokens(f"{first}+{second}="), tokens(f"{first + second}\n")
    text = question + answer
    weights = [0.0] * (len(question) - 1) + [1.0] * len(answer)
    return loops.Datum(model_input=text[:-1], loss_fn_inputs={"target_tokens": text[1:], "weights": weights})


def tokens(text: str) -> list[int]:
    """Return the tokens of the model ``tiny``: bytes."""
    return list(text.encode())


def draw(local: LocalService, run_id: str, out: Path) -> None:
    """Look at all runs and at one of them, in light and in dark."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme, device_scale_factor=1.5)
            page.goto(local.dashboard_url)
            for name, (width, height) in SIZES.items():
                page.set_viewport_size({"width": width, "height": height})
                if name == "dashboard_run":
                    page.locator(f"#runs a[href='#run={run_id}']").click()
                page.locator("article path.line:visible").first.wait_for()
                page.screenshot(path=out / f"{name}_{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main()
