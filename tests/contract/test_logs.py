"""What the log says of provisioning, in the client and in the embedded service."""

from __future__ import annotations

import logging
import re

import pytest

from loops_async import ServiceClient
from tests.support.engines import WatchedEngine
from tests.support.work import eventually


def stages(caplog: pytest.LogCaptureFixture, id_: str) -> list[str]:
    """Return the stages that the log has of one run or sampler."""
    found = [re.fullmatch(rf"(?:run|sampler) {id_}: (\S+), [\d.]+ s", one.getMessage()) for one in caplog.records]
    return [stage[1] for stage in found if stage]


async def test_each_stage_of_a_run_has_a_line(
    service: ServiceClient, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loops_async")
    trainer = await service.create_lora_training_client(engine.name, rank=4)
    await trainer.deactivate()
    await service.control_plane.deactivate_run(trainer.run_id)
    told = stages(caplog, trainer.run_id)
    assert [told[0], *told[-2:]] == ["created", "ready", "deactivated"]
    assert {"CREATED", "DEPLOYING", "RUNNING"} >= {*told[1:-2]} != set()
    assert {one.name for one in caplog.records if trainer.run_id in one.getMessage()} == {"loops_async.provisioning"}


async def test_a_sampler_that_is_attached_to_has_lines_as_well(
    service: ServiceClient, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loops_async")
    sampler = await service.create_sampling_client(engine.name)
    assert stages(caplog, str(sampler.sampler_id))[-1] == "ready"
    caplog.clear()
    await service.attach_sampling_client(sampler_id=sampler.sampler_id)
    assert stages(caplog, str(sampler.sampler_id))[-1] == "ready"


async def test_a_log_that_is_off_has_neither_requests_nor_stages(
    service: ServiceClient, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "loops_async")
    await service.create_sampling_client(engine.name)
    assert caplog.records == []


async def test_the_embedded_service_logs_requests_and_deployments(
    service: ServiceClient, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "loops_local")
    await service.create_sampling_client(engine.name)
    await eventually(lambda: "POST /v1/loops/samplers -> 200 in" in caplog.text)
    assert f"deploying a sampler of {engine.name}" in caplog.text
    assert {one.name for one in caplog.records} <= {
        f"loops_local.{child}" for child in ("http", "provisioning", "operations", "sampling")
    }
