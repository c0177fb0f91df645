"""``loops journal show``."""

from __future__ import annotations

from pathlib import Path

import pytest

import loops_async
from loops_local import LocalService
from tests.cli.conftest import Cli
from tests.support.work import example


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.journal"


async def work(service: loops_async.ServiceClient) -> loops_async.TrainingClient:
    trainer = await service.create_lora_training_client("echo", rank=4)
    await (await trainer.forward_backward([example(), example()]))
    await (await trainer.optim_step(loops_async.AdamParams()))
    await (await trainer.save_state("one"))
    return trainer


async def test_it_shows_what_was_done(cli: Cli, local: LocalService, path: Path) -> None:
    async with loops_async.ServiceClient(
        base_url=local.base_url, api_key=local.api_key, journal=path, on_exit="leave"
    ) as service:
        run_id = (await work(service)).run_id
        session = service.session_id
        # What is read is what is on disk, and the outcome of the last operation is written a moment later.
        await service.create_sampling_client("echo")
        found = cli.json("journal", "show", str(path))  # while the program runs

    assert (found["base_url"], found["session"], found["samples"]) == (local.base_url, session, 0)
    run, sampler = found["created"]
    assert (run["id"], run["kind"], run["model"], run["states"]) == (run_id, "run", "echo", {"done": 4})
    assert run["last_state"] == f"bt://loops:{run_id}/weights/one"
    assert (sampler["kind"], sampler["operations"]) == ("sampler", 0)

    shown = cli("journal", "show", str(path))
    assert f"service              {local.base_url}\n" in shown
    assert "4 done" in shown
    assert cli("journal", "show", str(path), "-q").splitlines() == [run_id, sampler["id"]]


async def test_it_lists_the_operations_of_a_run(cli: Cli, local: LocalService, path: Path) -> None:
    async with loops_async.ServiceClient(
        base_url=local.base_url, api_key=local.api_key, journal=path, on_exit="leave"
    ) as service:
        run_id = (await work(service)).run_id
    rows = cli.json("journal", "show", str(path), "--run", run_id)
    assert [(row["place"], row["operation"], row["state"], row["datums"]) for row in rows] == [
        (0, "init_trainer_server", "done", 0),
        (1, "forward_backward", "done", 2),
        (2, "optim_step", "done", 0),
        (3, "save_state", "done", 0),
    ]


def test_what_is_no_journal_is_said(cli: Cli, path: Path) -> None:
    assert "there is no journal" in cli.fails("journal", "show", str(path), code=2)
    path.write_text("notes\n" * 200)
    assert "cannot be read or written" in cli.fails("journal", "show", str(path), code=2)
