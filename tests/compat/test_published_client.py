"""The published client of the API, unmodified, against the embedded service.

It needs Python 3.12 or newer and gets an environment of its own, which is made once and kept in ``.venv-compat``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import loops_sync
from loops_local import LocalService, serve_in_thread
from tests.support import torch_engine

NEWEST_FIRST = ("3.14", "3.13", "3.12")
ROOT = Path(__file__).resolve().parents[2]
CLIENT = (ROOT / "locks" / "published.in").read_text().strip()
DRIVER = Path(__file__).with_name("driver.py")
PARTS = {
    *("session", "run", "cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "dppo", "dpo"),
    *("shapes and masks", "sampling", "save and load", "training clients from a state", "listing and download"),
    *("failures", "local mode"),
}


def candidates() -> Iterator[str]:
    if os.environ.get("LOOPS_COMPAT_PYTHON"):
        yield os.environ["LOOPS_COMPAT_PYTHON"]
    for version in NEWEST_FIRST:
        yield from filter(None, [shutil.which(f"python{version}")])
        yield from sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    if sys.version_info >= (3, 12):
        yield sys.executable  # last, so that test runs on several versions share one environment


def version_of(python: str) -> str | None:
    """Return an interpreter's version if it works; pyenv's own scripts exist for versions that it does not have."""
    asked = subprocess.run(
        [python, "-c", "import ensurepip, platform; print(platform.python_version())"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() if asked.returncode == 0 else None


@pytest.fixture(scope="module")
def published() -> Path:
    """Return the interpreter of an environment that has the published client."""
    found = next(((python, version) for python in candidates() if (version := version_of(python))), None)
    if found is None:
        pytest.skip("NOT TESTED: published clients need Python 3.12 or newer; set LOOPS_COMPAT_PYTHON to one")
    python, version = found
    directory = ROOT / ".venv-compat" / f"python-{version}"
    stamp = directory / CLIENT
    if not stamp.exists():
        shutil.rmtree(directory, ignore_errors=True)
        subprocess.run([python, "-m", "venv", directory], check=True)
        pip = [directory / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # The lock is complete, and most of what it has is never imported.
        lock = ["--no-deps", "--no-compile", "--require-hashes", "--requirement", str(ROOT / "locks" / "published.txt")]
        installed = subprocess.run([*pip, *lock], capture_output=True, text=True, check=False)
        if installed.returncode:
            pytest.skip(f"NOT TESTED: {CLIENT} cannot be installed: {installed.stderr.strip()[-300:]}")
        stamp.touch()
    return directory / "bin" / "python"


def drive(python: Path, local: LocalService, *arguments: str) -> set[str]:
    """Run the driver, and return what worked."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE", "PYTHON"))}
    environment |= {
        "LOOPS_BASE_URL": local.base_url,
        "BASETEN_API_KEY": local.api_key,
        "TRAINER_URL": local.trainer_url,
        "SAMPLER_URL": local.sampler_url,
    }
    run = subprocess.run(
        [python, DRIVER, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return {line.removeprefix("ok ") for line in run.stdout.splitlines() if line.startswith("ok ")}


@pytest.mark.torch
def test_it_trains_and_samples_for_real(published: Path) -> None:
    torch_engine.import_it_here()
    with serve_in_thread(model="tiny", provisioning_seconds=0.0) as local:
        with loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
            service.create_sampling_client("tiny")  # loads the model, for which the published client would wait 10 s
        assert drive(published, local, "tiny") == PARTS


def test_it_uses_the_serverless_form(published: Path) -> None:
    with serve_in_thread(engine="echo", serverless=True, provisioning_seconds=0.0) as local:
        assert drive(published, local, "echo", "serverless") == PARTS | {"no policy version"}
