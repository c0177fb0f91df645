"""Scripts for `tinker` find the embedded service by the environment, as users' scripts do."""

from __future__ import annotations

import pytest

import loops_tinker as tinker
from loops_local import LocalService


@pytest.fixture
def echo(echo_service: LocalService, monkeypatch: pytest.MonkeyPatch) -> LocalService:
    monkeypatch.setenv("LOOPS_BASE_URL", echo_service.base_url)
    monkeypatch.setenv("BASETEN_API_KEY", echo_service.api_key)
    return echo_service


@pytest.fixture
def trainer(echo: LocalService) -> tinker.TrainingClient:
    return tinker.ServiceClient().create_lora_training_client("echo", rank=4).result()


@pytest.fixture
def datum() -> tinker.Datum:
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [0.0, 1.0, 1.0]},
    )
