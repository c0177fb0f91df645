"""``loops sample``: one prompt, and files of them, whatever ends the command."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import loops_async
import loops_sync
from loops_async._batch.writer import MOST_PENDING
from loops_async.cli import sample as command_of_sample
from loops_local import LocalService, serve_in_thread
from loops_local.engine.base import SampleJob
from tests.cli.conftest import Cli
from tests.support.engines import Engines, WatchedEngine
from tests.support.patience import PATIENCE_SECONDS
from tests.support.warnings import WARNINGS


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
    given = [
        {"prompt": "hello"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt": [104, 105]},
        {"messages": [{"role": "user"}]},
    ]
    shown = cli("sample", "--run", trained[0], "-i", "-", "--max-tokens", "2", given=lines(given), code=7)
    answers = {answer["index"]: answer for answer in map(json.loads, shown.splitlines())}
    texts = [answers[index]["completions"][0]["text"] for index in range(3)]
    assert texts == ["he", "<u", "hi"]
    assert "the tokenizer refuses it: KeyError('content')" in answers[3]["error"]["message"]


def lines(rows: list[Any]) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def rows(count: int) -> list[Any]:
    return [{"id": f"row-{number}", "prompt": [97 + number % 26, 98]} for number in range(count)]


class Files:
    """The files of a batch, and its command."""

    def __init__(self, folder: Path, *target: str) -> None:
        self.input, self.output = folder / "prompts.jsonl", folder / "answers.jsonl"
        self.command = ("sample", *target, "-i", str(self.input), "-o", str(self.output), "--max-tokens", "3")

    def give(self, rows: list[Any]) -> None:
        self.input.write_text(lines(rows))

    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_bytes().splitlines()]


@pytest.fixture
def files(tmp_path: Path, trained: tuple[str, str]) -> Files:
    return Files(tmp_path, "--run", trained[0])


def test_a_file_goes_on_where_it_was_stopped(cli: Cli, local: LocalService, files: Files) -> None:
    files.give([*rows(30), "", {"prompt": [97, 98]}])
    assert cli(*files.command) == ""
    whole = files.answers()
    assert sorted(answer["index"] for answer in whole) == [*range(30), 31]
    assert {answer["id"] for answer in whole if "id" in answer} == {row["id"] for row in rows(30)}
    assert all(len(answer["completions"][0]["tokens"]) == 3 for answer in whole)

    # A kill left ten whole lines and a half one.
    kept = files.output.read_bytes().splitlines(keepends=True)
    files.output.write_bytes(b"".join(kept[:10]) + kept[10][:7])
    asked = local.faults.watch("POST */sample", times=100)
    report = cli.json(*files.command)
    assert len(asked) == 21
    local.faults.clear()
    assert (report["rows"], report["already"], report["answered"]) == (31, 10, 31)
    assert sorted(answer["key"] for answer in files.answers()) == sorted(answer["key"] for answer in whole)


def test_errors_are_recorded_and_end_with_codes(cli: Cli, local: LocalService, files: Files) -> None:
    files.give(rows(5))
    local.faults.answer("POST */sample", 422, {"message": "not this one"}, times=2)
    complaint = cli.fails(*files.command, code=7)
    assert "3 of 5 prompts answered, 2 failed; their errors are in the output" in complaint
    errors = [answer for answer in files.answers() if "error" in answer]
    assert {error["error"]["type"] for error in errors} == {"BadRequestError"}
    assert all(error["id"].startswith("row-") for error in errors)
    cli.fails(*files.command, code=7)
    cli(*files.command, "--retry-errors")
    assert len(files.answers()) == 5


def test_errors_that_may_pass(cli: Cli, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(*_: Any, **__: Any) -> Any:
        raise loops_async.RateLimitError("too many", status=429)

    files.give(rows(4))
    with monkeypatch.context() as broken:
        broken.setattr(loops_async.SamplingClient, "sample", busy)
        assert "run the same command again to retry 4 of them" in cli.fails(*files.command, code=1)
        assert "3 rows have failed" in " ".join(cli(*files.command, "--max-failures", "3", code=1).split()) + cli.err
    cli(*files.command)
    assert len(files.answers()) == 4


def test_a_key_that_is_refused_midway(cli: Cli, local: LocalService, files: Files) -> None:
    files.give(rows(300))
    local.faults.watch("POST */sample", times=20)
    local.faults.answer("POST */sample", 401, {"error": "no such key"}, times=1000)
    cli(*files.command, "--concurrency", "4", code=3)
    local.faults.clear()
    assert "no such key" in cli.err
    assert "20 of 300 prompts answered, 0 failed" in cli.err
    assert len(files.answers()) == 20
    cli(*files.command)
    assert len(files.answers()) == 300


def test_prompts_from_standard_input_to_standard_output(cli: Cli, trained: tuple[str, str]) -> None:
    shown = cli("sample", "--run", trained[0], "-i", "-", "--max-tokens", "2", given=lines(rows(3)))
    assert sorted(json.loads(line)["index"] for line in shown.splitlines()) == [0, 1, 2]


@pytest.mark.parametrize("line", ["{", '{"prompt": 3}', "{}"])
def test_lines_that_are_no_prompts_stop_nothing(cli: Cli, files: Files, line: str) -> None:
    files.give([*rows(1), line])
    cli.fails(*files.command, code=7)
    [error] = [answer["error"] for answer in files.answers() if "error" in answer]
    assert error["type"] == "InvalidLine"


def test_what_is_refused_changes_nothing(cli: Cli, local: LocalService, files: Files) -> None:
    assert "there is no such file" in cli.fails(*files.command, code=2)
    files.give([*rows(1), {"prompt": [1], "index": 5}])
    asked = local.faults.watch("POST */sample", times=100)
    assert "prompts.jsonl:2: has the field 'index'" in cli.fails(*files.command, code=2)
    assert not files.output.exists()
    files.give(rows(1))
    files.output.write_text("my diary\n")
    assert "is not a line that `loops sample` wrote" in cli.fails(*files.command, code=2)
    assert files.output.read_text() == "my diary\n"
    assert not asked
    local.faults.clear()


def test_other_settings_and_other_rows(cli: Cli, files: Files, trained: tuple[str, str]) -> None:
    files.give(rows(3))
    cli(*files.command)
    written = files.output.read_bytes()
    complaint = cli.fails(*files.command, "--temperature", "0.5", code=2)
    assert "temperature was 1.0 and is now 0.5" in complaint
    assert "keep both: --append. Nothing was sent" in complaint
    other = Files(files.input.parent, "--checkpoint", trained[1])
    assert "checkpoint_path was null and is now" in cli.fails(*other.command, code=2)
    assert files.output.read_bytes() == written
    cli(*other.command, "--append")
    assert len(files.answers()) == 6
    files.give(rows(2))
    complaint = cli.fails(*files.command, "--append", code=2)
    assert "has 1 answers to rows" in complaint
    assert ".stale: --drop-stale. Nothing was sent" in complaint
    cli(*files.command, "--append", "--drop-stale")
    assert len(files.answers()) == 5
    assert len(Path(f"{files.output}.stale").read_bytes().splitlines()) == 1


def test_samplers_of_different_checkpoints_are_different_settings(
    cli: Cli, files: Files, trained: tuple[str, str]
) -> None:
    made = [cli.json("samplers", "create", *which)["id"] for which in (("echo",), ("--checkpoint", trained[1]))]
    base, adapted = (Files(files.input.parent, "--sampler", each) for each in made)
    files.give(rows(1))
    cli(*base.command)
    assert "checkpoint_path was null" in cli.fails(*adapted.command, code=2)


# --- in a process of its own ---

COMMAND = [sys.executable, *WARNINGS, "-m", "loops_async.cli"]


class Watched:
    """A service on an engine that can be held, and what it was asked."""

    def __init__(self, local: LocalService, engine: WatchedEngine, sampler_id: str) -> None:
        self.environment = {"LOOPS_BASE_URL": local.base_url, "BASETEN_API_KEY": local.api_key}
        self.engine = engine
        self.sampler_id = sampler_id
        self.asked: list[SampleJob] = []
        sample = engine.sample

        def noted(job: SampleJob) -> Any:
            self.asked.append(job)
            return sample(job)

        engine.sample = noted  # type: ignore[method-assign]

    def start(self, files: Files, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *files.command, *options], env=os.environ | self.environment, stderr=subprocess.PIPE, text=True
        )


@pytest.fixture
def watched() -> Iterator[Watched]:
    engines = Engines()
    with (
        serve_in_thread(engine=engines, provisioning_seconds=0.0) as local,
        loops_sync.ServiceClient(base_url=local.base_url, api_key=local.api_key, on_exit="leave") as service,
    ):
        engine = engines("watched")
        yield Watched(local, engine, str(service.create_sampling_client("watched").sampler_id))
        engine.release_samples()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_batch_whose_process_is_killed_loses_and_doubles_nothing(watched: Watched, tmp_path: Path) -> None:
    count, concurrency = 400, 8
    files = Files(tmp_path, "--sampler", watched.sampler_id)
    files.give(rows(count))
    with watched.start(files, "--concurrency", str(concurrency)) as process:
        moment = random.randrange(20, 300)
        wait_until(lambda: len(watched.asked) >= moment)
        process.kill()
    kept = files.output.read_bytes().count(b"\n")

    report = Cli(watched.environment).json(*files.command)

    assert (report["rows"], report["already"], report["answered"]) == (count, kept, count)
    assert Counter(answer["id"] for answer in files.answers()) == Counter(row["id"] for row in rows(count))
    # Only what was under way or not yet written is paid again.
    assert len(watched.asked) <= count + 2 * concurrency + MOST_PENDING


def test_ctrl_c_writes_what_is_under_way(watched: Watched, tmp_path: Path) -> None:
    files = Files(tmp_path, "--sampler", watched.sampler_id)
    files.give(rows(50))
    watched.engine.hold_samples()
    with watched.start(files, "--concurrency", "4") as process:
        wait_until(lambda: watched.engine.waiting_samples == 4)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "waiting for what is under way" in process.stderr.readline()
        watched.engine.release_samples()
        assert process.wait(PATIENCE_SECONDS) == 130
        assert process.stderr.read().endswith("loops: interrupted\n")
    assert len(files.answers()) == len(watched.asked) < 50


def test_progress_is_a_line_where_there_is_no_terminal(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(tmp_path, "--sampler", watched.sampler_id)
    files.give(rows(3))
    printed: list[str] = []

    def print_line(*texts: str, **_: Any) -> None:  # older versions of rich end what is shown live with an empty print
        printed.extend(texts)
        watched.engine.release_samples()  # only now: without a line, the command would not end

    monkeypatch.setattr("loops_async._batch.progress.PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(command_of_sample.errors, "print", print_line)
    watched.engine.hold_samples()
    Cli(watched.environment)(*files.command)
    assert printed[0].startswith("loops: 0 of 3 prompts answered, 0 failed")
