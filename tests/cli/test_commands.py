"""Each command does what its name says, with human-readable output and with JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import loops_async
from loops_local import LocalService
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


class Bytes:
    """A tokenizer whose tokens are bytes, in place of one that takes seconds to import."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        return self("".join(f"<{message['role']}>{message['content']}" for message in messages))


@pytest.fixture
def byte_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def get_tokenizer(_: Any) -> Bytes:
        return Bytes()

    monkeypatch.setattr(loops_async.SamplingClient, "get_tokenizer", get_tokenizer)


@pytest.mark.usefixtures("byte_tokenizer")
def test_sampling_a_prompt(cli: Cli, trained: tuple[str, str]) -> None:
    run_id, path = trained
    for target in (("--run", run_id), ("--checkpoint", path)):
        first, _ = cli("sample", *target, "hello there", "--max-tokens", "8", "-n", "2").splitlines()
        assert first == "hello th"
    answer = cli.json("sample", "--run", run_id, "--max-tokens", "8", "--chat", "hi")
    assert answer["sequences"][0]["text"] == "<user>hi"


@pytest.mark.usefixtures("byte_tokenizer")
def test_sampling_texts_and_messages_of_a_file(cli: Cli, trained: tuple[str, str]) -> None:
    rows = [{"prompt": "hello"}, {"messages": [{"role": "user", "content": "hi"}]}, {"prompt": [104, 105]}]
    given = "\n".join(map(json.dumps, rows))
    shown = cli("sample", "--run", trained[0], "-i", "-", "--max-tokens", "2", given=given)
    texts = {answer["index"]: answer["completions"][0]["text"] for answer in map(json.loads, shown.splitlines())}
    assert texts == {0: "he", 1: "<u", 2: "hi"}


def rows(count: int) -> str:
    return "".join(json.dumps({"prompt": [97 + number % 26, 98]}) + "\n" for number in range(count))


def test_sampling_a_file_goes_on_where_it_was_stopped(
    cli: Cli, local: LocalService, trained: tuple[str, str], tmp_path: Path
) -> None:
    run_id, _ = trained
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(rows(30) + "\n" + rows(1))
    command = ("sample", "--run", run_id, "-i", str(prompts), "-o", str(answers), "--max-tokens", "3")
    cli(*command)
    whole = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(answer["index"] for answer in whole) == [*range(30), 31]
    assert all(len(answer["completions"][0]["tokens"]) == 3 for answer in whole)

    # A kill left ten whole lines and a half one.
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:10]) + lines[10][:7])
    asked = local.faults.watch("POST */sample", times=100)
    cli(*command)
    assert len(asked) == 21
    local.faults.clear()
    again = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(again, key=lambda answer: answer["index"]) == sorted(whole, key=lambda answer: answer["index"])


def test_prompts_that_fail_are_told_and_asked_again_later(
    cli: Cli, local: LocalService, trained: tuple[str, str], tmp_path: Path
) -> None:
    run_id, _ = trained
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(rows(5))
    command = ("sample", "--run", run_id, "-i", str(prompts), "-o", str(answers), "--max-tokens", "3")
    local.faults.answer("POST */sample", 422, {"message": "not this one"}, times=2)
    cli(*command, code=1)
    assert cli.err.count("not this one") == 2
    assert "2 prompts failed" in cli.err
    assert len(answers.read_text().splitlines()) == 3
    cli(*command)
    assert len(answers.read_text().splitlines()) == 5


def test_prompts_from_standard_input_to_standard_output(cli: Cli, trained: tuple[str, str]) -> None:
    run_id, _ = trained
    shown = cli("sample", "--run", run_id, "-i", "-", "--max-tokens", "2", given=rows(3))
    assert sorted(json.loads(line)["index"] for line in shown.splitlines()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", r"prompts.jsonl:2: is not a prompt"),
        ('{"prompt": 3}', r"prompts.jsonl:2: is not a prompt"),
        ("{}", 'prompts.jsonl:2: must have either "prompt" or "messages"'),
    ],
)
def test_lines_that_are_no_prompts(cli: Cli, trained: tuple[str, str], tmp_path: Path, line: str, problem: str) -> None:
    run_id, _ = trained
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(rows(1) + line + "\n")
    assert problem in cli.fails("sample", "--run", run_id, "-i", str(prompts), code=2)


def test_an_output_of_something_else_is_not_touched(cli: Cli, trained: tuple[str, str], tmp_path: Path) -> None:
    run_id, _ = trained
    prompts, precious = tmp_path / "prompts.jsonl", tmp_path / "precious"
    prompts.write_text(rows(1))
    precious.write_text("my diary\n")
    complaint = cli.fails("sample", "--run", run_id, "-i", str(prompts), "-o", str(precious), code=2)
    assert "is not a line that `loops sample` wrote" in complaint
    assert precious.read_text() == "my diary\n"
