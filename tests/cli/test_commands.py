"""Each command does what its name says, with human-readable output and with JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli


def test_a_run_from_beginning_to_end(cli: Cli) -> None:
    shown = cli("runs", "create", "echo", "--name", "first", "--rank", "4")
    run_id = shown.splitlines()[1].split()[0]
    assert "ready" in cli.err
    found = cli.json("runs", "show", run_id)
    assert (found["id"], found["name"], found["status"]["name"]) == (run_id, "first", "ACTIVE")
    assert "first" in cli("runs", "show", run_id)
    assert run_id in cli("runs", "list", "--model", "echo")
    assert cli.json("runs", "wait", run_id)[0]["id"] == run_id
    assert cli("runs", "deactivate", run_id) == f"deactivated {run_id}\n"
    assert cli.json("runs", "show", run_id)["status"]["name"] == "INACTIVE"


def test_many_runs_at_once(cli: Cli) -> None:
    made = cli.json("runs", "create", "many", "--count", "20", "--rank", "4")
    assert len({run["id"] for run in made}) == 20
    assert {run["sampler"]["status"]["name"] for run in made} <= {"ACTIVE", "LOADING_MODEL"}
    ids = [run["id"] for run in made]
    assert cli.json("runs", "deactivate", *ids) == {"deactivated": ids}
    assert {run["status"]["name"] for run in cli.json("runs", "list", "--model", "many")} == {"INACTIVE"}


def test_the_environment_counts_for_new_runs_as_in_a_client(cli: Cli) -> None:
    def create() -> Any:
        [made] = cli.json("runs", "create", "echo", "--no-wait")
        return made

    cli.environment["LOOPS_AVAILABILITY_MODEL"] = "spot"
    first, other = create(), create()
    assert cli.json("deployments", "show", first["deployment_id"])["availability_model"] == "spot"
    assert other["deployment_id"] != first["deployment_id"]
    cli.environment["LOOPS_REUSE_FROM_SESSION_ID"] = first["session_id"]
    second = create()
    assert second["deployment_id"] == first["deployment_id"]
    cli.environment["LOOPS_REUSE_FROM_RUN_ID"] = other["id"]
    assert create()["deployment_id"] == other["deployment_id"], "a run takes precedence over a session"


def test_some_of_many_fail(cli: Cli) -> None:
    [run] = cli.json("runs", "create", "echo", "--no-wait")
    shown = cli("runs", "wait", run["id"], "no-such-run", "--json", code=4)
    assert [each["id"] for each in json.loads(shown)] == [run["id"]]
    assert "no-such-run" in cli.err


def test_a_run_that_fails_is_deactivated_unless_it_is_kept(cli: Cli) -> None:
    assert "its weights are corrupt" in cli("runs", "create", "broken", code=5) + cli.err
    assert "deactivated" in cli.err
    cli("runs", "create", "broken", "--keep", code=5)
    assert "was kept (--keep)" in cli.err
    statuses = [run["status"]["name"] for run in cli.json("runs", "list", "--model", "broken")]
    assert statuses == ["ACTIVE", "INACTIVE"]


def test_samplers(cli: Cli, trained: tuple[str, str]) -> None:
    _, path = trained
    made = cli.json("samplers", "create", "--checkpoint", path)
    assert (made["base_model"], made["status"]["name"]) == ("echo", "ACTIVE")
    assert made["id"] in cli("samplers", "create", "echo", "--no-wait") + cli("samplers", "list")
    assert "ACTIVE" in cli("samplers", "show", made["id"])
    assert cli("samplers", "deactivate", made["id"]) == f"deactivated {made['id']}\n"
    assert cli.json("samplers", "show", made["id"])["status"]["name"] == "INACTIVE"
    assert "give a base model" in cli.fails("samplers", "create", code=2)


def test_checkpoints(cli: Cli, trained: tuple[str, str], tmp_path: Path) -> None:
    run_id, path = trained
    listed = cli.json("checkpoints", "list", "--run", run_id)
    assert {each["target"] for each in listed} == {"trainer", "sampler"}
    assert "end" in cli("checkpoints", "list", "--run", run_id)
    assert [each for each in cli.json("checkpoints", "list") if each["run_id"] == run_id] == listed
    [found] = cli.json("checkpoints", "list", "--path", path)
    assert found["id"] in {each["id"] for each in cli.json("checkpoints", "list", "--model", "echo")}

    files = cli.json("checkpoints", "files", path)
    assert all("signature=" in file["url"] for file in files)
    shown = cli("checkpoints", "files", found["id"])
    assert "adapter_model.safetensors" in shown
    assert "signature" not in shown
    assert cli.json("checkpoints", "source", path) == {"kind": "s3", "volume_ref": None, "path": None}
    assert "can be loaded" in cli("checkpoints", "validate", path)

    place = tmp_path / "weights"
    assert "2 files" in cli("checkpoints", "download", path, "--to", str(place))
    assert {file.name for file in place.iterdir()} == {file["relative_file_name"] for file in files}
    assert ", already complete, in " in cli("checkpoints", "download", path, "--to", str(place))
    assert cli.json("checkpoints", "download", found["id"], "--to", str(place))["bytes_fetched"] == 0
    model = ("--model-name", "mine", "--instance-type", "cpu", "--hf-secret", "hf")
    assert cli.json("checkpoints", "deploy", path, *model).keys() == {"model_id", "deployment_id"}


def test_deployments(cli: Cli, trained: tuple[str, str]) -> None:
    run_id, _ = trained
    deployment_id = cli.json("runs", "show", run_id)["deployment_id"]
    assert deployment_id in cli("deployments", "list")
    assert run_id in cli("deployments", "show", deployment_id)
    lines = cli("deployments", "logs", deployment_id, "--since", "1h")
    assert "deploying a trainer of echo" in lines
    as_json = cli("deployments", "logs", deployment_id, "--json", "--level", "INFO")
    assert [json.loads(line)["level"] for line in as_json.splitlines()]
    assert cli("deployments", "logs", deployment_id, "--limit", "1").count("\n") == 1
    assert "█" in cli("deployments", "metrics", deployment_id)
    assert "inference_volume" in cli.json("deployments", "metrics", deployment_id, "--since", "10m")
    assert cli("deployments", "deactivate", deployment_id) == f"deactivated {deployment_id}\n"
    assert cli.json("deployments", "show", deployment_id)["status"]["name"] == "STOPPED"
    assert (
        "expected a duration, e.g. 90s"
        in cli("deployments", "logs", deployment_id, "--since", "soon", code=2) + cli.err
    )


@pytest.mark.usefixtures("trained")
def test_capabilities(cli: Cli) -> None:
    [found] = cli.json("capabilities", "--model", "echo")["supported_models"]
    assert (found["model_name"], found["enabled"]) == ("echo", True)
    assert "longest sequence" in cli("capabilities", "--use-case", "sft")
