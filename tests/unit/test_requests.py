"""What a client's settings add to the requests that create runs and samplers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from loops_async._http.settings import Settings
from loops_async._session.requests import run_request, sampler_request

SETTINGS = Settings(
    base_url="https://loops.example",
    api_key=None,
    reuse_from_session_id="session",
    reuse_from_run_id="run",
    availability_model="spot",
)


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        (SETTINGS, {"reuse_from_run_id": "run", "availability_model": "spot"}),
        (msgspec.structs.replace(SETTINGS, reuse_from_run_id=None), {"reuse_from_session_id": "session"}),
    ],
)
def test_a_run_is_reused_before_a_session(settings: Settings, added: dict[str, Any]) -> None:
    sent = msgspec.to_builtins(run_request(settings, "s", base_model="m"))
    assert sent == sent | added
    assert ("reuse_from_run_id" in sent) is (sent["reuse_from_session_id"] is None)


def test_samplers_reuse_only_sessions() -> None:
    sent = msgspec.to_builtins(sampler_request(SETTINGS, "s", base_model="m"))
    assert sent == {
        "session_id": "s",
        "base_model": "m",
        "max_seq_length": None,
        "model_path": None,
        "reuse_from_session_id": "session",
        "availability_model": "spot",
    }


def test_a_field_wins_over_the_settings_and_none_keeps_the_default() -> None:
    sent = msgspec.to_builtins(run_request(SETTINGS, "s", base_model="m", availability_model="dedicated", name=None))
    assert sent["availability_model"] == "dedicated"
    assert "name" not in sent
