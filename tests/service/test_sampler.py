from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

import pytest

from loops_local.engine.echo import EchoEngine, logprob
from tests.service.api import MODEL, Api
from tests.support.patience import PATIENCE_SECONDS


async def test_answer_has_tokens_logprobs_and_text(api: Api) -> None:
    run = await api.run()
    body = {"prompt": [104, 105], "n": 2, "max_tokens": 3, "logprobs": 0, "prompt_logprobs": 0}
    answer = await api.post(f"{run['sampler']['base_url']}/sample", body)
    first, second = answer["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert first["token_ids"] == [104, 105, 104]
    assert second["token_ids"] == [105, 104, 105]
    assert first["text"] == "hih"
    assert first["finish_reason"] == "length"
    assert first["logprobs"]["tokens"] == ["token_id:104", "token_id:105", "token_id:104"]
    assert first["logprobs"]["token_logprobs"] == [logprob(105, 104, 0), logprob(104, 105, 0), logprob(105, 104, 0)]
    assert first["prompt_logprobs"][0] is None
    assert first["prompt_logprobs"][1]["105"]["logprob"] == logprob(104, 105, 0)


async def test_top_prompt_logprobs_and_prompt_ids_come_when_asked_for(api: Api) -> None:
    run = await api.run()
    choice, _ = await api.sample(run["sampler"]["base_url"], {"prompt_logprobs": 3, "return_token_ids": True})
    assert choice["prompt_token_ids"] == [5, 6, 7]
    for token, scores in zip((6, 7), choice["prompt_logprobs"][1:], strict=True):
        assert str(token) in scores
        assert len(scores) in (3, 4)
    bare, _ = await api.sample(run["sampler"]["base_url"], {"logprobs": None})
    assert bare["logprobs"] is bare["prompt_logprobs"] is bare["prompt_token_ids"] is None


@pytest.mark.parametrize(
    ("stop", "tokens", "text"),
    [
        ({"stop_token_ids": [98]}, [97, 98], "a"),
        ({"stop": "bc"}, [97, 98, 99], "a"),
        ({"stop": ["x", "c"]}, [97, 98, 99], "ab"),
    ],
)
async def test_stops_end_a_completion(api: Api, stop: dict[str, Any], tokens: list[int], text: str) -> None:
    run = await api.run()
    choice, _ = await api.sample(run["sampler"]["base_url"], {"prompt": [97, 98, 99], "max_tokens": 9, **stop})
    assert (choice["token_ids"], choice["text"], choice["finish_reason"]) == (tokens, text, "stop")


async def test_images_travel_in_chunks_and_are_refused_with_a_reason(api: Api) -> None:
    run = await api.run()
    url = f"{run['sampler']['base_url']}/sample"
    text = {"type": "encoded_text", "tokens": [1, 2]}
    assert (await api.post(url, {"prompt": [], "model_input_chunks": [text]}))["choices"][0]["token_ids"] == [1, 2]
    image = {"type": "image", "data": "AAAA", "format": "png", "expected_tokens": 4}
    error = await api.post(url, {"prompt": [], "model_input_chunks": [text, image]}, status=422)
    assert "images" in error["error"]


@pytest.mark.parametrize(
    "body",
    [
        {"n": 0},
        {"max_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -2},
        {"prompt": []},
        {"prompt": "text"},
        {"prompt_logprobs": 99},
        {"max_tokens": 40000},
        {"stop": 5},
    ],
)
async def test_bad_parameters_are_said_as_vllm_says_them(api: Api, body: dict[str, Any]) -> None:
    run = await api.run()
    error = await api.post(f"{run['sampler']['base_url']}/sample", {"prompt": [1]} | body, status=400)
    assert error["type"] == "BadRequestError"
    assert next(iter(body)) in error["message"] or "prompt" in error["message"]


@pytest.mark.parametrize("body", [{"structured_outputs": {"json": {}}}, {"include_routed_experts": True}])
async def test_what_the_engine_cannot_do_is_422(api: Api, body: dict[str, Any]) -> None:
    run = await api.run()
    error = await api.post(f"{run['sampler']['base_url']}/sample", {"prompt": [1]} | body, status=422)
    assert isinstance(error["error"], str)


async def test_a_sampler_shorter_than_its_model_keeps_to_its_length(api: Api) -> None:
    body = {"session_id": await api.session(), "base_model": MODEL, "max_seq_length": 4}
    sampler = (await api.post("/v1/loops/samplers", body))["sampler"]
    await api.sampler_ready(sampler)
    await api.sample(sampler["base_url"], {"prompt": [1, 2, 3], "max_tokens": 1})
    await api.post(f"{sampler['base_url']}/sample", {"prompt": [1, 2, 3], "max_tokens": 2}, status=400)


async def test_a_prompt_of_exactly_the_longest_length_can_be_scored(api: Api) -> None:
    body = {"session_id": await api.session(), "base_model": MODEL, "max_seq_length": 4}
    sampler = (await api.post("/v1/loops/samplers", body))["sampler"]
    await api.sampler_ready(sampler)
    scoring = {"prompt": [1, 2, 3, 4], "max_tokens": 1, "prompt_logprobs": 0}
    choice, _ = await api.sample(sampler["base_url"], scoring)
    assert len(choice["prompt_logprobs"]) == 4
    for refused in ({"prompt": [1, 2, 3, 4, 5]}, {"max_tokens": 2}, {"prompt_logprobs": None}):
        await api.post(f"{sampler['base_url']}/sample", {**scoring, **refused}, status=400)


# The gate, row by row (data-plane reference 3.6).


def scored_at(choice: dict[str, Any], step: int) -> bool:
    return choice["logprobs"]["token_logprobs"][0] == logprob(7, choice["token_ids"][0], step)


async def test_neither_header_serves_the_live_weights(api: Api) -> None:
    run = await api.run()
    root = run["sampler"]["base_url"]
    choice, version = await api.sample(root)
    assert version == "0"
    assert scored_at(choice, 0)
    assert await api.get(f"{root}/trainers_policy_version") == {"policy_version": None}
    await api.train(run, 2)
    assert (await api.sample(root))[1] == "0", "training alone does not change what is served"
    assert (await api.publish(run, "a"))["version"] == 2
    choice, version = await api.sample(root)
    assert version == "2"
    assert scored_at(choice, 2)
    assert await api.get(f"{root}/trainers_policy_version") == {"policy_version": 2}


async def test_a_staged_checkpoint_is_not_served(api: Api) -> None:
    run = await api.run()
    await api.train(run)
    path = (await api.publish(run, "staged", bump=False))["path"]
    root = run["sampler"]["base_url"]
    assert (await api.sample(root))[1] == "0"
    choice, version = await api.sample(root, headers={"X-Checkpoint-Path": path})
    assert version is None
    assert scored_at(choice, 1)


async def test_floor_waits_for_the_version_and_gives_up_with_408(serve: Any) -> None:
    api = await serve(version_wait_seconds=0.05)
    run = await api.run()
    root = run["sampler"]["base_url"]
    await api.train(run)
    floor = {"X-Min-Policy-Version": "1"}
    error = await api.post(f"{root}/sample", {"prompt": [1]}, headers=floor, status=408)
    assert "version 1" in error["error"]
    patient = await serve(version_wait_seconds=PATIENCE_SECONDS)
    run = await patient.run()
    await patient.train(run)
    waiting = asyncio.create_task(patient.sample(run["sampler"]["base_url"], headers=floor))
    await patient.publish(run)
    assert (await waiting)[1] == "1"


async def test_checkpoint_and_floor_serve_the_checkpoint_until_the_floor_is_reached(api: Api) -> None:
    run = await api.run()
    root = run["sampler"]["base_url"]
    await api.train(run)
    path = (await api.publish(run, "one"))["path"]
    both = {"X-Checkpoint-Path": path, "X-Min-Policy-Version": "2"}
    choice, version = await api.sample(root, headers=both)
    assert version is None
    assert scored_at(choice, 1)
    await api.train(run)
    await api.publish(run, "two")
    choice, version = await api.sample(root, headers=both)
    assert version == "2"
    assert scored_at(choice, 2)
    choice, _ = await api.sample(root, headers={"X-Checkpoint-Path": path})
    assert scored_at(choice, 1)
    choice, version = await api.sample(root, {"lora": path})
    assert version is None
    assert scored_at(choice, 1)


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Min-Policy-Version": "soon"},
        {"X-Min-Policy-Version": "-1"},
        {"X-Checkpoint-Path": "s3://bucket"},
        {"X-Checkpoint-Path": "bt://loops:nobody/sampler_weights/x"},
        {"X-Run-Id": "another"},
    ],
)
async def test_bad_headers_are_400(api: Api, headers: dict[str, str]) -> None:
    run = await api.run()
    root = run["sampler"]["base_url"]
    assert (await api.post(f"{root}/sample", {"prompt": [1]}, headers=headers, status=400))["type"] == "BadRequestError"


async def test_a_checkpoint_of_another_model_is_refused(api: Api) -> None:
    run, other = await api.run(), await api.run(base_model="other")
    path = (await api.publish(other))["path"]
    headers = {"X-Checkpoint-Path": path}
    error = await api.post(f"{run['sampler']['base_url']}/sample", {"prompt": [1]}, headers=headers, status=400)
    assert "other" in error["error"]


async def test_models_lists_the_base_and_the_live_adapter(api: Api) -> None:
    run = await api.run()
    root = run["sampler"]["base_url"]
    base = {"id": MODEL, "parent": None, "tokenizer": "tokenizer"}
    assert (await api.get(f"{root}/v1/models"))["data"] == [base]
    path = (await api.publish(run, "step-1"))["path"]
    live = {"id": path, "parent": MODEL, "tokenizer": None}
    assert (await api.get(f"{root}/v1/models"))["data"] == [base, live]
    await api.sample(root, {"model": MODEL})
    await api.post(f"{root}/sample", {"prompt": [1], "model": "nobody"}, status=404)


async def test_tokenizer_files_are_served(api: Api) -> None:
    run = await api.run()
    root = run["sampler"]["base_url"]
    assert await api.get(f"{root}/tokenizer") == {"files": ["tokenizer.json", "tokenizer_config.json"]}
    assert len((await api.get(f"{root}/tokenizer/tokenizer.json"))["model"]["vocab"]) == 259
    for name in ("nothing", "..%2Fstore.sqlite3", "%2e%2e"):
        await api.ask("GET", f"{root}/tokenizer/{name}", status=404)


class Stuck(EchoEngine):
    """An engine that never answers a sample."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.futures: list[Future[Any]] = []

    def sampler(self) -> Any:
        return self

    def submit(self, _job: Any) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]

    def close(self) -> None:
        for future in self.futures:
            future.cancel()


async def test_a_caller_that_goes_away_cancels_its_sample(serve: Any) -> None:
    engine = Stuck("m")
    api = await serve(engine=lambda _name: engine)
    run = await api.run()
    sampling = asyncio.create_task(api.sample(run["sampler"]["base_url"]))

    async def is_submitted() -> bool:
        return bool(engine.futures)

    await api.until(is_submitted)
    sampling.cancel()

    async def is_cancelled() -> bool:
        return engine.futures[0].cancelled()

    await api.until(is_cancelled)


async def test_many_samples_at_once(api: Api) -> None:
    run = await api.run()
    root = run["sampler"]["base_url"]
    answers = await asyncio.gather(*(api.sample(root, {"prompt": [token, 1]}) for token in range(200)))
    assert [choice["token_ids"][0] for choice, _ in answers] == list(range(200))
