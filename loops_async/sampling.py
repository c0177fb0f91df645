"""Sampling: completions and logprobs from one sampler."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from time import monotonic
from typing import Any, Final, Literal, TypeAlias
from uuid import uuid4

from msgspec import UNSET, Struct
from msgspec.structs import replace

from . import protocol
from ._arguments import check_at_least, check_kind, check_model_input, check_positive
from ._copies import SameWhenCopied
from ._http.endpoint import Endpoint
from ._http.messages import MOST_RESULT_BYTES, Answer, Request
from ._http.retry import SAMPLE, Failure, failure_of, retry
from ._http.settings import checked_url, resolve_settings
from ._journal.journal import Journal
from ._journal.records import Completed
from ._other_names import KnowsOtherNames
from ._sampling.adaptive import Adaptive
from ._sampling.completions import read_completions
from ._sampling.limiter import Limiter, as_limiter, report_rejection, slots
from ._sampling.many import BoundedMap, map_in_processes
from ._sampling.queue import SampleQueue
from ._sampling.tokenizer import load_tokenizer
from ._session.deactivation import deactivate_sampler
from ._session.readiness import wait_for_version
from ._session.runtime import Runtime, detached_runtime
from ._session.served_models import base_model_of, fetch_served_models
from ._tasks import gather_or_raise
from ._waiting import TimeLimit
from ._work.registry import Entry
from ._work.usage import Counts
from .errors import (
    ApiError,
    ClosedError,
    ConfigError,
    InputError,
    LoopsError,
    LostAnswerError,
    ProtocolError,
    SampleTimeoutError,
    UnsupportedError,
    without_quote,
)
from .types import (
    BasetenDeployment,
    EncodedTextChunk,
    LocalDeployment,
    ModelInput,
    SampledPrompt,
    SamplerDeployment,
    SampleResponse,
    SamplingParams,
    ServerlessDeployment,
)

__all__ = ["SamplingClient"]

log: logging.Logger = logging.getLogger("loops_async.sampling")

_Prompt: TypeAlias = "ModelInput | Sequence[int]"

MODELS_CACHE_SECONDS: Final = 5.0
VERSION_SECONDS: Final = 600.0


class Weights(Struct, frozen=True, kw_only=True):
    """The weights that a client samples: by default, those that the sampler serves at that time.

    `checkpoint_id` is given where the service tells it: it names exactly one of those that have had the path.
    """

    checkpoint_path: str | None = None
    checkpoint_id: str | None = None
    min_policy_version: int | None = None

    def headers(self, sampler: Mapping[str, str]) -> dict[str, str]:
        """Return the headers of requests for these weights, given those that name the sampler."""
        headers = dict(sampler)
        if self.checkpoint_path is not None:
            headers.pop(protocol.SAMPLER_ID, None)  # the path names the run; a gateway accepts only one name
            headers[protocol.CHECKPOINT_PATH] = self.checkpoint_path
        if self.checkpoint_id is not None:
            headers[protocol.CHECKPOINT_ID] = self.checkpoint_id
        if self.min_policy_version:
            headers[protocol.MIN_POLICY_VERSION] = str(self.min_policy_version)
        return headers


_LIVE_WEIGHTS: Final = Weights()


class SamplingClient(SameWhenCopied, KnowsOtherNames):
    """Samples from one sampler.

    A lightweight value that shares the service client's connection pool: a thousand cost nothing, and none needs
    closing. It can be pickled, without the API key; in another process the key is read from ``BASETEN_API_KEY``.
    Created by `TrainingClient.save_weights_and_get_sampling_client`, `TrainingClient.create_sampling_client`,
    `ServiceClient.create_sampling_client`, `ServiceClient.create_sampling_client_from_checkpoint`,
    `ServiceClient.attach_sampling_client` and `ServiceClient.standalone_sampler`.

    Example:
        ::

            answer = await sampler.sample(prompt, num_samples=4, sampling_params=loops.SamplingParams(max_tokens=64))
            print(answer.sequences[0].text)
    """

    def __init__(self) -> None:
        raise TypeError("a sampling client is created by a ServiceClient or a TrainingClient")

    def _set_up(self, endpoint: Endpoint, weights: Weights, runtime: Runtime | None) -> None:
        self._sampler = endpoint
        self._weights = weights
        self._endpoint = replace(endpoint, headers=weights.headers(endpoint.headers))
        self._runtime = runtime
        self._call = SAMPLE.waiting(endpoint.ready_timeout)
        self._models: tuple[float, protocol.ServedModels] | None = None

    @property
    def sampler_id(self) -> str | None:
        """The id of the sampler, for `ServiceClient.attach_sampling_client`; None without a control plane."""
        return self._endpoint.sampler_id

    @property
    def run_id(self) -> str | None:
        """The id of the run that the sampler is paired with; None for a standalone sampler, or if it is not known."""
        return self._endpoint.run_id

    @property
    def checkpoint_path(self) -> str | None:
        """The ``bt://`` URI of the checkpoint that this client samples, if it is bound to one."""
        return self._weights.checkpoint_path

    @property
    def checkpoint_name(self) -> str | None:
        """The name of the checkpoint that this client samples, if it is bound to one."""
        path = self._weights.checkpoint_path
        return protocol.CheckpointUri.parse(path).name if path else None

    @property
    def min_policy_version(self) -> int | None:
        """The oldest version of the trainer's weights that may answer this client's requests."""
        return self._weights.min_policy_version

    def get_base_model(self) -> str:
        """Return the name of the base model."""
        return self._endpoint.base_model

    def with_options(self, *, timeout: float | None) -> SamplingClient:
        """Return a client of the same sampler and weights whose samples have another time limit.

        Args:
            timeout: the time limit of one sample in seconds, as in `sample`; None for no limit.
        """
        if timeout is not None:
            timeout = check_positive(timeout, "timeout")
        return sampling_client(replace(self._sampler, timeout=timeout), self._weights, self._runtime)

    async def sample(
        self,
        prompt: ModelInput | Sequence[int],
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        *,
        affinity_key: str | None = None,
        include_routed_experts: bool | None = None,
        timeout: float | None = None,
    ) -> SampleResponse:
        """Complete a prompt.

        Waits until the sampler is ready (see `ensure_ready`). A request that the service certainly did not
        execute is retried. One that was perhaps executed is not, since it would be paid for twice; only a queue, which
        recognizes it, is asked again.

        Args:
            prompt: the prompt, as a `ModelInput` or a list of token ids.
            num_samples: the number of completions, at least 1.
            sampling_params: how to sample; `SamplingParams()` when None.
            include_prompt_logprobs: also score the prompt's own tokens.
            topk_prompt_logprobs: also list this many most likely candidates at each prompt position.
            affinity_key: requests with the same key go to the same replica; use one for each rollout group.
            include_routed_experts: capture which experts a mixture-of-experts model chose, for
                `Datum.routed_experts_ref`; None is the service's default.
            timeout: the time limit in seconds, retries included; None is the client's own limit, 300 s by default (see
                `with_options`). It starts when the sampler is ready and the sample is one of those that the service
                client may have in flight (``BT_LOOPS_MAX_CONNECTIONS``).

        Raises:
            InputError: an argument is invalid; nothing was sent.
            LostAnswerError: the answer was lost, e.g. behind a gateway's 504; the sample may have been paid for.
            SampleTimeoutError: no answer within `timeout`.
            SamplerTerminatedError: the sampler's deployment has ended, so it will not become ready.
            NotReadyError: the sampler was not ready within `ready_timeout`.
            BudgetExceededError: the service client's `Budget` does not allow it; nothing was sent.
            ApiError: the service refused the request.
        """
        body = self._checked_body(prompt, num_samples, sampling_params, include_prompt_logprobs, topk_prompt_logprobs)
        if include_routed_experts is not None:
            body.include_routed_experts = bool(include_routed_experts)
        key = str(uuid4())
        request = self._endpoint.request(
            "POST",
            "/sample",
            "sample",
            body=protocol.encode(body),
            headers={**self._endpoint.headers, protocol.IDEMPOTENCY_KEY: key, **_affinity_header(affinity_key)},
            timeout=self._limit(timeout),
            most_bytes=MOST_RESULT_BYTES,
        )
        runtime = await self._usable_runtime()
        ids = {"id": key, "run_id": self._endpoint.run_id, "sampler_id": self._endpoint.sampler_id}
        with runtime.transport.work.begin("sample", "sample", subject=body, endpoint=self._endpoint, **ids) as entry:
            if runtime.journal is not None and runtime.journal.records_samples:
                answer = await self._recorded(runtime, runtime.journal, request, body, entry)
            else:
                answer = await self._completed(runtime, request, body, entry)
            entry.result = read_completions(
                answer.body,
                prompt=body.prompt,
                topk=topk_prompt_logprobs,
                policy_version=answer.version,
                request_id=answer.request_id,
                clean=runtime.transport.errors.clean,
                counts=entry.counts,
                prompt_length=None if body.model_input_chunks is UNSET else body.length,
            )
        response: SampleResponse = entry.result
        return response

    async def sample_many(
        self,
        prompts: Iterable[ModelInput | Sequence[int]] | AsyncIterable[ModelInput | Sequence[int]],
        *,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        timeout: float | None = None,
        limit: int | Adaptive | Limiter = 256,
        ordered: bool = False,
        on_error: Literal["raise", "return", "skip"] | None = None,
        keep_errors: bool = False,
        processes: int | None = None,
    ) -> AsyncIterator[SampledPrompt]:
        """Complete any number of prompts, in constant memory, and yield the outcome of each when it completes.

        A slow consumer slows the sampling down: no more is sampled while `limit` completions wait for it. Leaving the
        loop early cancels the requests in flight.

        A plain iterable is read on the event loop: each of its steps must be quick.

        Args:
            prompts: read only as fast as they are sampled, so the iterable may be endless.
            num_samples: the number of completions of each prompt.
            sampling_params: how to sample; `SamplingParams()` when None.
            include_prompt_logprobs: also score the prompts' own tokens.
            topk_prompt_logprobs: also list this many most likely candidates at each prompt position.
            timeout: the time limit of each sample in seconds, as in `sample`.
            limit: the most completions in flight at once (`num_samples` for each prompt; a prompt with more is sampled
                alone). `Adaptive` finds the number at which the sampler is fastest; a `Limiter` is shared with others.
            ordered: yield results in the order of the prompts; a slow prompt delays those after it.
            on_error: what follows when a prompt fails: ``"raise"`` (the default) ends the loop with its error,
                ``"return"`` yields the error as its outcome, and ``"skip"`` logs a warning and yields nothing for it.
            keep_errors: the same as ``on_error="return"``.
            processes: distribute the work over this many processes, if one core cannot decode the answers fast
                enough; `limit` must be a number then. They read the API key from ``BASETEN_API_KEY``; as always with
                `multiprocessing`, the script needs ``if __name__ == "__main__":``.

        Raises:
            InputError: an argument is invalid; an invalid prompt is a prompt that fails.
            ConfigError: `processes` was given, and the API key is not in the environment, or a process cannot start.
            WorkerDiedError: a worker process ended, and `on_error` is ``"raise"``; it is the error of the prompts that
                were sampled there, some of which may have been paid for.
            LoopsError: a prompt failed, and `on_error` is ``"raise"``; the requests in flight are cancelled.

        Example:
            ::

                async for done in sampler.sample_many(prompts, sampling_params=params, limit=64):
                    print(done.index, done.response.sequences[0].text)
        """
        limiter = as_limiter(limit)
        on_failure = _checked_on_error(on_error, keep_errors=keep_errors)
        num_samples = check_at_least(num_samples, 1, "num_samples")
        arguments = {
            "num_samples": num_samples,
            "sampling_params": sampling_params,
            "include_prompt_logprobs": include_prompt_logprobs,
            "topk_prompt_logprobs": topk_prompt_logprobs,
            "timeout": timeout,
        }
        is_raised = on_failure == "raise"

        def most_prompts() -> int:
            return limiter.limit // num_samples

        if processes is None:
            work = partial(_outcome, partial(_limited, self, limiter, arguments), is_raised)
            # One more than have a place: it waits, which shows an adaptive limit that it could be larger.
            outcomes = BoundedMap(prompts, work, most=lambda: most_prompts() + 1, ordered=ordered).results()
        else:
            processes = check_at_least(processes, 1, "processes")
            if isinstance(limit, Adaptive | Limiter):
                raise InputError("limit", f"must be a number with `processes`, which share no limiter; got {limit!r}")
            if self._runtime and self._runtime.journal and self._runtime.journal.records_samples:
                raise InputError("processes", "cannot be used with journal_samples=True, which records in this process")
            self._check_key_in_environment()
            sample_chunk = partial(_chunk_outcomes, self, arguments, is_raised)
            most = most_prompts()
            watch = partial(self._chunk, await self._usable_runtime(), num_samples, sampling_params or SamplingParams())
            outcomes = map_in_processes(
                prompts,
                sample_chunk,
                watch=watch,
                lost=partial(_lost_outcomes, is_raised),
                processes=processes,
                limit=most,
                ordered=ordered,
            )
        async with aclosing(outcomes):
            async for index, outcome in outcomes:
                if not isinstance(outcome, LoopsError):
                    yield SampledPrompt(index=index, response=outcome)
                elif on_failure == "return":
                    yield SampledPrompt(index=index, error=outcome)
                else:
                    log.warning("prompt %d is skipped: %s", index, without_quote(outcome))

    async def compute_logprobs(
        self, prompt: ModelInput | Sequence[int], *, affinity_key: str | None = None, timeout: float | None = None
    ) -> list[float | None]:
        """Return the logprob of each prompt token given the tokens before it, in nats; entry 0 is None.

        `affinity_key`, `timeout` and errors are those of `sample`.
        """
        answer = await self.sample(
            prompt,
            1,
            SamplingParams(max_tokens=1, temperature=0.0),
            include_prompt_logprobs=True,
            affinity_key=affinity_key,
            timeout=timeout,
        )
        if answer.prompt_logprobs is None:
            raise ProtocolError(
                f"the sampler at {self._endpoint.url} sent no prompt logprobs though they were requested"
            )
        return answer.prompt_logprobs

    async def ensure_ready(self, ready_timeout: float | None = None) -> None:
        """Wait until the sampler's deployment is ACTIVE, and start it once if it was scaled to zero.

        A local sampler counts as ready. `ready_timeout` is in seconds; None uses that of the client.

        Raises:
            SamplerTerminatedError: the sampler's deployment has ended, so it will not become ready.
            NotReadyError: it is not ready within `ready_timeout`.
        """
        runtime = await self._usable_runtime()
        await self._ready(runtime, self._endpoint.ready_timeout if ready_timeout is None else ready_timeout)

    async def wait_for_version(self, version: int, *, timeout: float | None = None) -> None:
        """Wait until the sampler serves at least version `version` of the trainer's weights.

        `timeout` is in seconds; None is 600.

        Raises:
            NotReadyError: the sampler does not become ready, or still serves an older version after `timeout`.
        """
        version = check_at_least(version, 0, "version")
        seconds = VERSION_SECONDS if timeout is None else check_positive(timeout, "timeout")
        runtime = await self._usable_runtime()
        await self._ready(runtime, self._endpoint.ready_timeout)
        await wait_for_version(self._endpoint, version, runtime.transport, seconds=seconds)

    @classmethod
    async def ensure_ready_for_deployment(
        cls,
        *,
        base_model: str,
        deployment: SamplerDeployment,
        api_key: str | None = None,
        ready_timeout: float = 3600.0,
    ) -> None:
        """Wait until a sampler that you have no client for is ready; with a client, use `ensure_ready`.

        Args:
            base_model: the sampler's base model; informative only.
            deployment: where it runs; this returns at once unless it is a `BasetenDeployment`.
            api_key: default ``BASETEN_API_KEY``.
            ready_timeout: the longest wait in seconds.

        Raises:
            InputError: a `BasetenDeployment` without a model id, a deployment id or a valid base URL.
            SamplerTerminatedError: the sampler's deployment has ended, so it will not become ready.
            NotReadyError: it is not ready within `ready_timeout`.
        """
        check_positive(ready_timeout, "ready_timeout")
        if not isinstance(deployment, BasetenDeployment):
            return
        for name in ("model_id", "deployment_id"):
            if getattr(deployment, name) is None:
                raise InputError(f"deployment.{name}", "must be given: the sampler's state is read by this id")
        checked_url(deployment.base_url, "deployment.base_url")
        runtime = Runtime(resolve_settings(api_key=api_key, base_url=deployment.api_base_url))
        try:
            endpoint = Endpoint(deployment=deployment, base_model=base_model, headers={})
            await sampling_client(endpoint, runtime=runtime).ensure_ready(ready_timeout)
        finally:
            await runtime.close()

    async def discover_base_model_name(self) -> str:
        """Return the base model's name as the sampler reports it; for a serverless sampler, as this client has it."""
        if isinstance(self._endpoint.deployment, ServerlessDeployment):
            return self._endpoint.base_model
        return base_model_of(await self._served_models(), self._endpoint)

    async def discover_adapter_name(self) -> str | None:
        """Return the name of the loaded adapter, if any; for a serverless sampler, the checkpoint's path."""
        if isinstance(self._endpoint.deployment, ServerlessDeployment):
            return self._weights.checkpoint_path
        models = await self._served_models()
        return next((model.id for model in models.data if model.parent is not None), None)

    async def get_tokenizer(self) -> Any:
        """Return the Hugging Face tokenizer of the base model; needs transformers."""
        return await load_tokenizer(await self._usable_runtime(), self._endpoint)

    async def deactivate(self) -> None:
        """Deactivate the sampler, which must be a standalone one; all of its clients can then sample no more.

        Repeating the call is harmless. The sampler of a run ends with the run, whose training would be lost with it:
        deactivate that with `TrainingClient.deactivate`, or with ``loops down RUN_ID``.

        Raises:
            UnsupportedError: the sampler is paired with a run, or the service cannot deactivate samplers.
            BadRequestError: the same, where only the service knows that it is paired.
        """
        if self.run_id is not None:
            raise UnsupportedError(
                f"this sampler belongs to run {self.run_id} and ends with it: use `deactivate` of a TrainingClient, or "
                f"`loops down {self.run_id}`"
            )
        sampler_id = self.sampler_id
        if sampler_id is None:
            raise UnsupportedError("this sampler was not created by a control plane, so it cannot be deactivated here")
        if self._runtime is None and isinstance(self._endpoint.deployment, ServerlessDeployment):
            raise UnsupportedError(
                "this client was unpickled and does not know the control plane; deactivate the sampler with "
                f"ServiceClient.attach_sampling_client(sampler_id={sampler_id!r}), or with `loops down {sampler_id}`"
            )
        runtime = await self._connected_runtime()
        if not runtime.running.is_deactivated(sampler_id):
            await deactivate_sampler(runtime.control_plane, sampler_id)

    async def close(self) -> None:
        """Do nothing: a sampling client owns no connections. The sampler keeps running; see `deactivate`."""

    def __repr__(self) -> str:
        return f"<SamplingClient sampler={self.sampler_id or '-'} base_model={self._endpoint.base_model}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return sampling_client, (self._sampler, self._weights)

    # --- requests ---

    def _check_key_in_environment(self) -> None:
        settings = self._runtime.settings if self._runtime else None
        if settings and settings.api_key and not os.environ.get("BASETEN_API_KEY"):
            raise ConfigError(
                "processes: worker processes read the API key from BASETEN_API_KEY, since a key is never pickled; set "
                "it in the environment instead of passing api_key"
            )

    @contextmanager
    def _chunk(
        self, runtime: Runtime, num_samples: int, params: SamplingParams, prompts: Sequence[_Prompt]
    ) -> Generator[Callable[[Sequence[SampleResponse | LoopsError]], None]]:
        """Have a chunk of prompts under way that a worker process samples; what is yielded counts its answers."""
        work, completions = runtime.transport.work, num_samples * len(prompts)
        lengths = [_length(prompt) for prompt in prompts]
        ids = {"run_id": self._endpoint.run_id, "sampler_id": self._endpoint.sampler_id}
        with work.begin("sample", f"{len(prompts)} prompts in a process", endpoint=self._endpoint, **ids) as entry:
            entry.turn_to("answer")
            asked = Counts(samples=len(prompts), prompt_tokens=sum(lengths), completion_tokens=completions)
            work.admit(entry, asked, most_completions=completions * (params.max_tokens or 1))

            def count(outcomes: Sequence[SampleResponse | LoopsError]) -> None:
                for length, outcome in zip(lengths, outcomes, strict=True):
                    if isinstance(outcome, SampleResponse):
                        entry.counts.sampled(length, sum(len(sequence.tokens) for sequence in outcome.sequences))

            yield count

    def _checked_body(
        self,
        prompt: ModelInput | Sequence[int],
        num_samples: int,
        sampling_params: SamplingParams | None,
        include_prompt_logprobs: bool,
        topk_prompt_logprobs: int,
    ) -> protocol.SampleBody:
        params = SamplingParams() if sampling_params is None else sampling_params
        prompt = check_model_input(prompt, "prompt")
        num_samples = check_at_least(num_samples, 1, "num_samples")
        params = check_kind(params, SamplingParams, "sampling_params")
        topk_prompt_logprobs = check_at_least(topk_prompt_logprobs, 0, "topk_prompt_logprobs")
        scores_prompt = include_prompt_logprobs or topk_prompt_logprobs > 0
        body = _sample_body(prompt, num_samples, params, topk_prompt_logprobs if scores_prompt else None)
        # A queue serves many models, and so may a local sampler without a run id; a dedicated sampler may refuse a
        # request that names a model.
        match self._endpoint.deployment:
            case ServerlessDeployment():
                body.model = self._endpoint.base_model
                body.lora = self._weights.checkpoint_path or UNSET
            case LocalDeployment() if self._endpoint.run_id is None:
                body.model = self._endpoint.base_model
            case _:
                pass
        return body

    async def _recorded(
        self, runtime: Runtime, journal: Journal, request: Request, body: protocol.SampleBody, entry: Entry
    ) -> Completed:
        """Return the answer that the journal has, or send the request and record the answer."""
        # Not the oldest version that may answer: in a loop, that depends on the moment. Older answers are left out.
        weights = f"{self.run_id}/{self.sampler_id}/{self._weights.checkpoint_path}".encode()

        async def ask(key: str) -> Completed:
            headers = {**request.headers, protocol.IDEMPOTENCY_KEY: key}
            return await self._completed(runtime, replace(request, headers=headers), body, entry)

        return await journal.sample(
            (weights, request.content),
            request.headers[protocol.IDEMPOTENCY_KEY],
            ask,
            floor=self._weights.min_policy_version or 0,
            is_queued=isinstance(self._endpoint.deployment, ServerlessDeployment),
        )

    async def _completed(
        self, runtime: Runtime, request: Request, body: protocol.SampleBody, entry: Entry
    ) -> Completed:
        """Send a sample when it is one of those that may be in flight."""
        async with runtime.admission:
            if entry.work.budget is not None:
                entry.work.admit(entry, _asked(body), most_completions=body.n * (body.max_tokens or 1))
            if isinstance(self._endpoint.deployment, ServerlessDeployment):
                queue = SampleQueue(self._endpoint, runtime.transport)
                key = request.headers[protocol.IDEMPOTENCY_KEY]
                completions, request_id = await queue.answer(request, key=key)
                return Completed(completions, "", request_id)
            answer = await self._answer(runtime, request)
            version = answer.headers.get(protocol.POLICY_VERSION, "")
            return Completed(answer.body, version, runtime.transport.errors.request_id(answer))

    async def _answer(self, runtime: Runtime, request: Request) -> Answer:
        await self._ready(runtime, self._endpoint.ready_timeout)
        timeout, attempt = request.timeout, replace(request, timeout=None)
        failure: LoopsError | None = None

        async def ask() -> Answer:
            nonlocal failure
            failure = None
            try:
                return await self._ask(runtime, attempt, limit)
            except LoopsError as error:
                failure = error
                report_rejection(error)
                raise

        with TimeLimit(timeout) as limit:
            return await self._paid_once(ask, runtime)
        state = (
            f"The last attempt failed: {failure}"
            if failure is not None
            else "The sampler may still be working on it; it is not retried, since it would be paid for twice."
        )
        raise SampleTimeoutError(
            f"{request.what} ({request.method} {request.url}): no answer within {timeout} s, retries included. "
            f"{state} Request fewer tokens or samples, or increase `timeout`.",
            timeout=timeout,
        ) from failure

    async def _paid_once(self, ask: Callable[[], Awaitable[Answer]], runtime: Runtime) -> Answer:
        budget = runtime.transport.retry_budget
        try:
            return await retry(ask, self._call, what="the sampler did not answer", budget=budget)
        except LoopsError as error:
            if failure_of(error) not in (Failure.LOST, Failure.CUT):
                raise
            raise LostAnswerError(
                f"{error} The sample may have been generated and paid for, so the request was not repeated. Sample "
                "again if you accept to pay for it twice."
            ) from error

    def _limit(self, timeout: float | None) -> float | None:
        """Return the time limit of a sample, given that of the call."""
        if timeout is None:
            return self._endpoint.timeout
        return check_positive(timeout, "timeout")

    async def _ask(self, runtime: Runtime, request: Request, limit: TimeLimit) -> Answer:
        answer = await runtime.transport.send(request)
        if answer.is_success:
            return answer
        error = runtime.transport.errors.of_answer(request, answer)
        # A model that is still being deployed answers 400 or 404, as to a bad request; its state shows which it is.
        gate = runtime.gate(self._endpoint)
        if gate is not None and isinstance(error, ApiError) and error.status in (400, 404):
            await gate.recheck()
            if not gate.is_open:
                error.retryable = True
                with limit.paused():
                    await gate.wait(self._endpoint.ready_timeout)
        if isinstance(error, ApiError) and error.status == 408 and protocol.MIN_POLICY_VERSION in request.headers:
            # The sampler's own answer while it does not serve the version yet; a page is a gateway's.
            error.may_have_acted = error.from_gateway and bool(answer.body)
        raise error

    async def _ready(self, runtime: Runtime, ready_timeout: float) -> None:
        gate = runtime.gate(self._endpoint)
        if gate is not None:
            await gate.wait(ready_timeout)

    async def _served_models(self) -> protocol.ServedModels:
        if self._models is None or monotonic() - self._models[0] > MODELS_CACHE_SECONDS:
            runtime = await self._usable_runtime()
            await self._ready(runtime, self._endpoint.ready_timeout)
            self._models = monotonic(), await fetch_served_models(self._endpoint, runtime.transport)
        return self._models[1]

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self._runtime is None:
            raise ClosedError("this client was unpickled and belongs to no event loop: await its calls in any of them")
        return self._runtime.transport.loop

    async def _usable_runtime(self) -> Runtime:
        runtime = await self._connected_runtime()
        runtime.running.check(run_id=self._endpoint.run_id, sampler_id=self._endpoint.sampler_id)
        return runtime

    async def _connected_runtime(self) -> Runtime:
        if self._runtime is None:
            # An unpickled client belongs to no event loop: it may be used in several `asyncio.run` calls in turn.
            return await detached_runtime(self._endpoint)
        self._runtime.transport.check_usable()
        return self._runtime


def sampling_client(
    endpoint: Endpoint, weights: Weights = _LIVE_WEIGHTS, runtime: Runtime | None = None
) -> SamplingClient:
    """Return a client of a sampler; without a `runtime` it uses that of the event loop that calls it."""
    client = SamplingClient.__new__(SamplingClient)
    client._set_up(endpoint, weights, runtime)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - our constructor
    return client


def _checked_on_error(on_error: Any, *, keep_errors: bool) -> str:
    if on_error not in (None, "raise", "return", "skip"):
        raise InputError("on_error", f"must be 'raise', 'return' or 'skip'; got {on_error!r}")
    if keep_errors and on_error not in (None, "return"):
        raise InputError("on_error", f"contradicts keep_errors=True, which means 'return'; got {on_error!r}")
    return "return" if keep_errors else on_error or "raise"


async def _limited(
    client: SamplingClient, limiter: Limiter, arguments: Mapping[str, Any], prompt: _Prompt
) -> SampleResponse:
    """Sample a prompt when the limiter has places for it."""
    async with slots(limiter, arguments["num_samples"]) as held:
        response = await client.sample(prompt, **arguments)
        held.finished(sum(len(sequence.tokens) for sequence in response.sequences))
    return response


async def _outcome(
    sample: Callable[[_Prompt], Awaitable[SampleResponse]], is_raised: bool, prompt: _Prompt
) -> SampleResponse | LoopsError:
    try:
        return await sample(prompt)
    except LoopsError as error:
        if is_raised:
            raise
        return error


async def _chunk_outcomes(
    client: SamplingClient, arguments: Mapping[str, Any], is_raised: bool, prompts: Sequence[_Prompt]
) -> list[SampleResponse | LoopsError]:
    """Sample a chunk of the prompts in a worker process."""
    sample = partial(client.sample, **arguments)
    return await gather_or_raise([_outcome(sample, is_raised, prompt) for prompt in prompts])


def _lost_outcomes(is_raised: bool, prompts: Sequence[_Prompt], error: LoopsError) -> list[SampleResponse | LoopsError]:
    """Return the outcomes of a chunk whose process ended, so that no answer is known, or that was never begun."""
    if is_raised:
        raise error
    return [error for _ in prompts]


def _sample_body(
    prompt: ModelInput, num_samples: int, params: SamplingParams, prompt_logprobs: int | None
) -> protocol.SampleBody:
    has_images = prompt.has_images
    stop, stop_token_ids = _stops(params.stop)
    return protocol.SampleBody(
        prompt=[] if has_images else _tokens(prompt),
        n=num_samples,
        temperature=params.temperature,
        top_p=params.top_p,
        model_input_chunks=prompt.chunks if has_images else UNSET,
        return_token_ids=True,
        prompt_logprobs=UNSET if prompt_logprobs is None else prompt_logprobs,
        max_tokens=UNSET if params.max_tokens is None else params.max_tokens,
        seed=UNSET if params.seed is None else params.seed,
        top_k=params.top_k if params.top_k > 0 else UNSET,
        stop=stop,
        stop_token_ids=stop_token_ids,
        structured_outputs=UNSET if params.structured_outputs is None else params.structured_outputs,
    )


def _length(prompt: Any) -> int:
    """Return the length of a prompt that is not checked yet; 0 for what is none."""
    if isinstance(prompt, ModelInput):
        return prompt.length
    return len(prompt) if hasattr(prompt, "__len__") else 0


def _tokens(prompt: ModelInput) -> list[int]:
    """Return the prompt's tokens; a single text chunk is not copied, since thousands may be in flight."""
    only = prompt.chunks[0]
    return only.tokens if len(prompt.chunks) == 1 and isinstance(only, EncodedTextChunk) else prompt.to_ints()


def _asked(body: protocol.SampleBody) -> Counts:
    """Return what a sample uses for certain; each completion has at least one token."""
    return Counts(samples=1, prompt_tokens=body.length, completion_tokens=body.n, requests=1)


def _affinity_header(key: str | None) -> dict[str, str]:
    if key is None:
        return {}
    if not isinstance(key, str) or not key.isprintable():
        raise InputError("affinity_key", f"must be a printable string; got {key!r}")
    if not key:
        raise InputError("affinity_key", "must not be empty")
    return {protocol.AFFINITY: key}


def _stops(stop: str | list[str | int] | None) -> tuple[Any, Any]:
    """Split `stop` into the wire's two fields."""
    if not stop:
        return UNSET, UNSET
    if isinstance(stop, str):
        return stop, UNSET
    texts = [one for one in stop if isinstance(one, str)]
    ids = [one for one in stop if isinstance(one, int)]
    if texts and ids:
        raise InputError("sampling_params.stop", f"must be all strings or all token ids; got {stop!r}")
    return texts or UNSET, ids or UNSET
