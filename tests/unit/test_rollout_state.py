"""The file of a stream's state: whole or as before, and refused when it is damaged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from loops_async import InputError, RolloutState

STATE = RolloutState(
    version=7, next_index=41, pending=[40, 33], dropped=2, failed=1, path="bt://loops:r/weights/step-7", run_id="r"
)


@pytest.mark.parametrize("kind", [str, Path], ids=["str", "Path"])
def test_what_was_written_is_read(tmp_path: Path, kind: Any) -> None:
    file = kind(tmp_path / "rollouts.json")
    assert RolloutState.read(file) is None
    for state in (RolloutState(), STATE):
        state.write(file)
        assert RolloutState.read(file) == state
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts.json"]


@pytest.mark.parametrize("cut", ["fsync", "mode", "rename"])
def test_a_file_that_could_not_be_written_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    file = tmp_path / "rollouts.json"
    STATE.write(file)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "no space left on device")

    match cut:
        case "fsync":
            monkeypatch.setattr(os, "fsync", fail)
        case "mode":
            monkeypatch.setattr("shutil.copymode", fail)
        case _:
            monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        RolloutState(version=8).write(file)
    monkeypatch.undo()
    assert RolloutState.read(file) == STATE
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts.json"]


def test_the_content_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def flush(descriptor: int) -> None:
        events.append("flush")
        fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", rename)
    STATE.write(tmp_path / "rollouts.json")
    assert events[:2] == ["flush", "rename"]


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        STATE.write(tmp_path / "nowhere" / "rollouts.json")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "truncated"),
        (b'{"version": 7, "pend', "truncated"),
        (b"\xff\xfe", "malformed|invalid"),
        (b'{"version": "\xff"}', "."),
        (b"[1, 2]", "Expected `object`"),
        (b'{"version": -1}', ">= 0"),
        (b'{"version": "7"}', "Expected `int`"),
        (b'{"next_index": 3, "pending": [3]}', "must be different numbers of tasks before next_index=3"),
        (b'{"next_index": 3, "pending": [1, 1]}', "must be different numbers"),
    ],
    ids=["empty", "cut", "binary", "no text", "list", "negative", "string", "ahead", "twice"],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "rollouts.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=problem) as refused:
        RolloutState.read(file)
    assert refused.value.path == str(file)
    assert "Delete it to start anew" in str(refused.value)


def test_what_a_later_version_adds_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "rollouts.json"
    file.write_bytes(b'{"version": 7, "colour": "blue"}')
    assert RolloutState.read(file) == RolloutState(version=7)
