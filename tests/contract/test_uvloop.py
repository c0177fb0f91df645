"""The same work on uvloop's event loop."""

from __future__ import annotations

import asyncio
import sys

import pytest

import loops_async as loops
import loops_local

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="uvloop is not for Windows")


def test_training_and_sampling_on_uvloop() -> None:
    import uvloop

    async def main() -> list[int]:
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        async with (
            loops_local.LocalService(engine="echo") as local,
            loops.ServiceClient(base_url=local.base_url, api_key=local.api_key) as service,
        ):
            trainer = await service.create_lora_training_client("echo")
            datum = loops.Datum(model_input=[1, 2, 3], loss_fn_inputs={"target_tokens": [2, 3, 4]})
            step = await trainer.forward_backward([datum] * 64)
            await (await trainer.optim_step(loops.AdamParams()))
            assert len((await step).loss_fn_outputs) == 64
            sampler = await trainer.save_weights_and_get_sampling_client("uvloop")
            answers = sampler.sample_many([[number] for number in range(100)], limit=16, ordered=True)
            return [answer.index async for answer in answers]

    assert uvloop.run(main()) == list(range(100))
