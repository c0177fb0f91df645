"""The command line against a service on the echo engine."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

import loops_async
from loops_async.cli._app import app
from loops_local import LocalService, serve_in_thread
from tests.support.engines import echo_unless_broken
from tests.support.warnings import WARNINGS

COMMAND = [sys.executable, *WARNINGS, "-m", "loops_async.cli"]
"""How the command line is started as a process."""


@pytest.fixture(scope="session")
def local() -> Iterator[LocalService]:
    with serve_in_thread(engine=echo_unless_broken, provisioning_seconds=0.05) as local:
        yield local


class Cli:
    """Runs commands as a shell would, but in this process."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.err = ""

    def __call__(self, *arguments: str, code: int = 0, given: str | None = None) -> str:
        """Run a command that must end with `code`, and return what it prints."""
        result = CliRunner().invoke(app, [*arguments], env=self.environment, input=given)
        self.err = result.stderr
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        key = self.environment["BASETEN_API_KEY"]
        assert not key or key not in result.output
        return result.stdout

    def json(self, *arguments: str) -> Any:
        """Run a command with ``--json``, and return what it prints."""
        return json.loads(self(*arguments, "--json"))

    def fails(self, *arguments: str, code: int) -> str:
        """Run a command that must fail, and return its complaint: one paragraph on standard error."""
        self(*arguments, code=code)
        [complaint] = self.err.strip().split("\n")
        assert complaint.startswith("loops: ")
        return complaint


@pytest.fixture
def cli(local: LocalService) -> Cli:
    return Cli({"LOOPS_BASE_URL": local.base_url, "BASETEN_API_KEY": local.api_key})


@pytest.fixture
def trained(local: LocalService) -> tuple[str, str]:
    """A run with a checkpoint of each kind, and the path of the one for samplers."""

    async def train() -> tuple[str, str]:
        async with loops_async.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service:
            trainer = await service.create_lora_training_client("echo", rank=4)
            await (await trainer.optim_step(loops_async.AdamParams())).result()
            await (await trainer.save_state("end")).result()
            saved = await (await trainer.save_weights_for_sampler("end")).result()
            return trainer.run_id, saved.path

    return asyncio.run(train())
