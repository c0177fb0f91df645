"""Nothing has to be closed: however a script ends, its process ends, with its own code, and without a word of ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loops_local import LocalService, serve_in_thread
from loops_tinker.__main__ import PATH
from tests.support.patience import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import asyncio, sys
import tinker
from tinker import types
service = tinker.ServiceClient()
"""
TRAIN = """
trainer = service.create_lora_training_client("echo", rank=4)
data = [types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1, 1]})]
print(trainer.forward_backward(data, "cross_entropy").result().loss_fn_output_type, flush=True)
"""
INTERRUPTED = -signal.SIGINT


@pytest.fixture(scope="module")
def endless() -> Iterator[LocalService]:
    """A service whose trainers are never ready."""
    with serve_in_thread(engine="echo", provisioning_seconds=3600.0) as local:
        yield local


def start(script: str, directory: Path, service: LocalService) -> subprocess.Popen[str]:
    file = directory / "script.py"
    file.write_text(script)
    environment = {
        "LOOPS_BASE_URL": service.base_url,
        "BASETEN_API_KEY": service.api_key,
        "PYTHONPATH": f"{PATH}{os.pathsep}{ROOT}",
    }
    command = [sys.executable, str(file)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("script", "code", "last_line"),
    [
        (TRAIN, 0, ""),
        (TRAIN + "raise ValueError('mine')", 1, "ValueError: mine"),
        (TRAIN + "sys.exit(3)", 3, ""),
        (TRAIN + "service.close().result()", 0, ""),
        (TRAIN + "with tinker.ServiceClient() as other: other.create_lora_training_client('echo').result()", 0, ""),
        (TRAIN + "for _ in range(9): trainer.save_state('x'); trainer.optim_step()", 0, ""),
    ],
    ids=["return", "exception", "exit", "closed", "with", "pending"],
)
def test_a_script_ends(echo: LocalService, tmp_path: Path, script: str, code: int, last_line: str) -> None:
    process = start(BEGIN + script, tmp_path, echo)
    output, errors = end(process)
    assert (output, process.returncode) == ("echo\n", code), errors
    assert errors.strip().split("\n")[-1] == last_line
    assert "loops" not in errors


@pytest.mark.parametrize(
    "wait",
    [
        "print('waits', flush=True)\ntrainer.result()",
        "print('waits', flush=True)\ntrainer.forward_backward([])",
        "async def main():\n    print('waits', flush=True)\n    await trainer\nasyncio.run(main())",
    ],
    ids=["result", "use", "await"],
)
def test_an_interrupted_script_ends(endless: LocalService, tmp_path: Path, wait: str) -> None:
    script = f"{BEGIN}trainer = service.create_lora_training_client('echo')\n{wait}"
    process = start(script, tmp_path, endless)
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGINT)
    _, errors = end(process)
    assert process.returncode == INTERRUPTED, errors
    assert errors.strip().split("\n")[-1] == "KeyboardInterrupt"


def test_a_script_that_leaves_a_client_on_its_way_ends(endless: LocalService, tmp_path: Path) -> None:
    process = start(BEGIN + "service.create_lora_training_client('echo')", tmp_path, endless)
    assert (*end(process), process.returncode) == ("", "", 0)
