"""Runs the training loops of `tinker-cookbook`, unmodified, on the embedded service, and looks at what they learned.

Usage: tools/cookbook.sh [--only WORD] [--picture FILE]

Each loop is a script (`programs.py`) in a process of its own. When it has written some rows and saved its state, the
process is killed, and another one must go on from there. In the end the loss must have fallen, or the reward or the
margin risen. Prints one line for each loop, and draws all curves.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from loops_local import serve_in_thread
from loops_local.engine import Engine, load_engine

ROOT = Path(__file__).resolve().parents[2]
MODEL = "Qwen/Qwen3-8B-Base"
AT_ONCE = 2
PATIENCE_SECONDS = 200
KILLED_AT = 7
"""How many rows of metrics a loop has written when it is killed."""
SAVED_AT = 5
"""The step whose state the programs have saved by then."""
QUESTION = "How many?"
README = "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: train.jsonl}\n---\n"


@dataclass(frozen=True)
class Judge:
    """A loop, its steps, and the metric that must fall or rise by a factor or by a difference."""

    name: str
    steps: int
    metric: str
    change: float
    begins_with: str | None = None
    """The loop whose last state this one continues."""

    def has_learned(self, curve: list[float]) -> bool:
        end = sum(curve[-3:]) / 3
        return end - curve[0] <= self.change if self.change < 0 else end - curve[0] >= self.change


JUDGES = (
    Judge("supervised.train", 25, "train_mean_nll", -4.0),
    Judge("rl.train, spawned workers", 12, "env/all/reward/total", 0.2),
    Judge("recipes.rl_loop", 16, "reward/total", 0.2, begins_with="supervised.train"),
    Judge("rl.train", 16, "env/all/reward/total", 0.2),
    Judge("rl.train, asynchronous", 24, "env/all/reward/total", 0.15),
    Judge("rl.train, minibatches", 16, "env/all/reward/total", 0.2),
    Judge("recipes.sl_loop", 16, "train_mean_nll", -4.0),
    Judge("preference.train_dpo", 16, "margin", 1.0),
)


class Runner:
    """Runs judges in `directory`, in which the data sets of the recipes are files."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._directory = directory
        self._environment = environment
        self._ended = {judge.name: Event() for judge in JUDGES}
        self.curves: dict[str, list[float]] = {}
        """The values of the metric of each loop."""

    def run(self, judge: Judge) -> str | None:
        """Return what is wrong with a loop, or None."""
        try:
            return self._judge(judge)
        except Exception as problem:
            return f"{type(problem).__name__}: {problem}"
        finally:
            self._ended[judge.name].set()

    def _judge(self, judge: Judge) -> str | None:
        log = self._log(judge.name)
        if judge.begins_with is not None:
            self._ended[judge.begins_with].wait()
            log.mkdir()
            last = (self._log(judge.begins_with) / "checkpoints.jsonl").read_text().splitlines()[-1]
            (log / "checkpoints.jsonl").write_text(last + "\n")
        began = time.monotonic()
        killed = self._start(judge, log, "killed.log")
        while len(_rows(log)) < KILLED_AT and killed.poll() is None:
            _check_patience(began, killed)
            time.sleep(0.05)
        if killed.poll() is not None:
            return f"ended before it was killed:\n{_end_of(log.with_suffix('.killed.log'))}"
        _kill(killed)
        resumed = self._start(judge, log, "resumed.log")
        while resumed.poll() is None:
            _check_patience(began, resumed)
            time.sleep(0.05)
        output = log.with_suffix(".resumed.log")
        if resumed.returncode:
            return f"exit code {resumed.returncode}:\n{_end_of(output)}"
        values = {int(row["step"]): float(row[judge.metric]) for row in _rows(log) if judge.metric in row}
        curve = [values[step] for step in sorted(values)]
        if "Resum" not in output.read_text():
            return "was not resumed"
        self.curves[judge.name] = curve
        if len(curve) < judge.steps - 2:
            return f"only {len(curve)} steps of {judge.steps}"
        return None if judge.has_learned(curve) else f"has not learned: {[round(value, 2) for value in curve]}"

    def _start(self, judge: Judge, log: Path, name: str) -> subprocess.Popen[bytes]:
        arguments = ["run", "-m", "tests.cookbook.programs", judge.name, str(log), str(judge.steps)]
        with log.with_suffix(f".{name}").open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "loops_tinker", *arguments],
                cwd=self._directory,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log(self, name: str) -> Path:
        return self._directory / name.replace(", ", "-").replace(" ", "-").replace(".", "-")


def _rows(log: Path) -> list[dict[str, float]]:
    file = log / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # half a line: the process was killed while it wrote
    return rows


def _check_patience(began: float, process: subprocess.Popen[bytes]) -> None:
    if time.monotonic() - began > PATIENCE_SECONDS:
        _kill(process)
        raise TimeoutError(f"not done after {PATIENCE_SECONDS} s")


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)  # with the workers that it has started
    process.wait()


def _end_of(output: Path) -> str:
    return "\n".join(output.read_text().splitlines()[-25:])


def _write_data(directory: Path) -> None:
    """Write the data sets of the recipes, which look for them by these names."""
    talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "\\boxed{7}"}]
    rows = {
        "HuggingFaceH4/no_robots": [{"messages": talk}] * 400,
        "openai/gsm8k": [{"question": QUESTION, "answer": "It is #### 7"}] * 400,
    }
    for name, lines in rows.items():
        (directory / name).mkdir(parents=True)
        (directory / name / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (directory / "openai/gsm8k/README.md").write_text(README)


def _tiny(name: str) -> Engine:
    return load_engine("torch", "tiny", cache_dir=Path(tempfile.gettempdir()), device="cpu")


def _draw(curves: dict[str, list[float]], picture: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(14, 6), layout="constrained")
    for axis, judge in zip(axes.flat, JUDGES, strict=True):
        axis.plot(curves.get(judge.name, []), marker=".")
        axis.axvline(SAVED_AT - 0.5, color="grey", linestyle=":", label="killed and resumed")
        axis.set(title=judge.name, xlabel="step", ylabel=judge.metric)
    axes.flat[0].legend()
    figure.suptitle("The loops of tinker-cookbook 0.6.1, unmodified, on the embedded service")
    figure.savefig(picture, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="run the loops whose names contain this")
    parser.add_argument("--picture", type=Path, help="draw all curves into this file")
    arguments = parser.parse_args()
    names = {judge.name for judge in JUDGES if arguments.only in judge.name}
    names |= {judge.begins_with for judge in JUDGES if judge.name in names and judge.begins_with}
    judges = [judge for judge in JUDGES if judge.name in names]
    began, problems = time.monotonic(), 0
    with (
        tempfile.TemporaryDirectory() as made,
        serve_in_thread(engine=_tiny, models=[MODEL], provisioning_seconds=0.02) as local,
        ThreadPoolExecutor(AT_ONCE) as threads,
    ):
        directory = Path(made)
        _write_data(directory)
        environment = {
            **os.environ,
            "LOOPS_BASE_URL": local.base_url,
            "BASETEN_API_KEY": local.api_key,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(directory / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        runner = Runner(directory, environment)
        for judge, problem in zip(judges, threads.map(runner.run, judges), strict=True):
            curve = runner.curves.get(judge.name)
            ends = f"{judge.metric} from {curve[0]:.2f} to {curve[-1]:.2f}" if curve else ""
            print(f"{judge.name:28} {'FAILED: ' + problem if problem else 'learned'} {ends}", flush=True)
            problems += problem is not None
        if arguments.picture:
            _draw(runner.curves, arguments.picture)
    print(f"{len(judges) - problems} of {len(judges)} loops learned, in {time.monotonic() - began:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
