"""The output of the quickstarts: progress, tables, a chart, and whether everything was learned."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from loops_async import Checkpoint, CheckpointDownload, ProvisioningEvent


class Show:
    """Shows progress and results; the two curves are kept in `losses` and `rewards`."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rewards: list[float] = []
        self._console = Console(highlight=False)
        self._failures: list[str] = []
        self._provisioning = ExitStack()
        # The embedded service logs here when it downloads or loads a model.
        handler = RichHandler(console=self._console, show_time=False, show_level=False, show_path=False)
        logging.getLogger("loops_local").addHandler(handler)
        logging.getLogger("loops_local").setLevel(logging.INFO)

    def part(self, title: str) -> None:
        """Print the title of a part."""
        self._console.rule(f"[bold]{title}")

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show a spinner during the block, and how long it took."""
        columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(what, total=1)
            yield
            progress.advance(task)

    def provisioning(self, event: ProvisioningEvent) -> None:
        """Show a spinner until a new run is ready; for `on_progress`."""
        if event.stage == "created":
            self._provisioning.enter_context(self.waiting("provisioning a trainer and a sampler"))
        elif event.stage in ("ready", "failed"):
            self._provisioning.close()

    def steps(self, what: str, count: int, curve: list[float], unit: str) -> Iterator[int]:
        """Count the steps of a loop in a bar that also shows the newest point of `curve`."""
        last = TextColumn(unit + " {task.fields[last]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), last, TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(what, total=count, last="")
            for step in range(count):
                yield step
                progress.update(task, advance=1, last=f"{curve[-1]:.3f}")

    def answers(self, facts: Mapping[str, str], before: Sequence[str], after: Sequence[str]) -> None:
        """Show the answers before and after training, and check that all are right after it."""
        table = Table("question", "before", "after", box=SIMPLE_HEAD)
        for (question, fact), old, new in zip(facts.items(), before, after, strict=True):
            colour = "green" if new == fact else "red"
            table.add_row(question, _ending(old), f"[{colour}]{_ending(new)}")
        self._console.print(table)
        known = sum(answer == fact for answer, fact in zip(after, facts.values(), strict=True))
        known_before = sum(answer == fact for answer, fact in zip(before, facts.values(), strict=True))
        self._console.print(f"right answers: {known_before} of {len(facts)} before, {known} of {len(facts)} after")
        self._check(known == len(facts), f"the model knows {known} of {len(facts)} facts")

    def improvement(self) -> None:
        """Show the reward at the start and at the end, and check that it rose."""
        first, last = _mean(self.rewards[:3]), _mean(self.rewards[-5:])
        self._console.print(f"mean reward: {first:.2f} in the first three steps, {last:.2f} in the last five")
        self._check(last > first + 0.15, f"the mean reward went from {first:.2f} to {last:.2f}, no clear rise")

    def checkpoints(self, checkpoints: Iterable[Checkpoint]) -> None:
        """List checkpoints with their sizes."""
        table = Table("checkpoint", "for", "size", box=SIMPLE_HEAD)
        for checkpoint in checkpoints:
            table.add_row(checkpoint.checkpoint_id, checkpoint.target, f"{checkpoint.size_bytes / 1e6:.1f} MB")
        self._console.print(table)

    def downloaded(self, download: CheckpointDownload) -> None:
        """Show the size and the directory of a download."""
        size = f"{download.file_count} files, {download.bytes_written / 1e6:.1f} MB"
        self._console.print(f"downloaded to [bold]{download.dest_dir}[/]: {size}")

    def draw(self, path: Path) -> None:
        """Draw both curves side by side."""
        mpl.use("Agg")
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        left.semilogy(range(1, len(self.losses) + 1), self.losses, marker="o", color="tab:blue")
        left.set(title="Supervised: eight invented facts", xlabel="step", ylabel="loss (nats per answer token)")
        right.plot(range(1, len(self.rewards) + 1), self.rewards, marker="o", color="tab:orange")
        right.set(title="Policy gradient: yes or no", xlabel="step", ylabel="mean reward", ylim=(0, 1))
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=120)
        self._console.print(f"curves drawn in [bold]{path}")

    def verdict(self) -> int:
        """Return 0 if everything was learned; otherwise print what is missing, and return 1."""
        for failure in self._failures:
            self._console.print(f"[bold red]not learned:[/] {failure}")
        return 1 if self._failures else 0

    def _check(self, success: bool, failure: str) -> None:
        if not success:
            self._failures.append(failure)


def _ending(text: str, width: int = 21) -> str:
    """Return the end of an answer, since most begin by repeating the question."""
    line = " ".join(text.split())
    return line if len(line) <= width else "…" + line[-(width - 1) :]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
