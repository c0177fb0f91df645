"""Every call of the client, each with the route whose answer is changed."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from aiohttp import web

import loops_async as loops
from loops_async._session.deactivation import END_SECONDS
from loops_local import FaultProxy, LocalService
from loops_local.faults import Fault
from loops_local.faults.plan import Exchange

from .answers import Mutation

DATUM = loops.Datum(model_input=[1, 20, 30], loss_fn_inputs={"target_tokens": [20, 30, 40]})
PARAMS = loops.SamplingParams(max_tokens=3)
CASE_SECONDS = 0.7
"""A call that still repeats its request after this is cancelled: its patience is tested elsewhere."""
CANCEL_SECONDS = END_SECONDS + 5.0
"""A cancelled call first deactivates what it made, for which the end of a scope has the longest time."""


class Change:
    """What is done to the next answers of a route."""

    def __init__(self) -> None:
        self.route = ""
        self.mutations: list[Mutation] = []
        self.times = 0
        self.seen: list[str] = []

    def begin(self, route: str, mutations: list[Mutation], *, times: int) -> None:
        """Change the next `times` answers of `route`."""
        self.route, self.mutations, self.times, self.seen = route, mutations, times, []

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and fnmatchcase(f"{method} {path}", self.route)

    def apply(self, answer: web.Response) -> web.Response:
        """Return the changed answer, and note it."""
        self.times -= 1
        for mutation in self.mutations:
            answer = mutation.apply(answer)
        body = answer.body if isinstance(answer.body, bytes) else b""
        self.seen.append(f"{answer.status} {body[:200]!r}")
        return answer


class ChangedAnswer(Fault, frozen=True, kw_only=True, tag="changed_answer"):
    """Let the service execute the request, and pass its answer on with a change."""

    change: Any

    def matches(self, method: str, path: str) -> bool:
        return bool(self.change.matches(method, path))

    async def happen(self, exchange: Exchange) -> web.StreamResponse:
        return self.change.apply(await exchange.execute())  # type: ignore[no-any-return]


class Lane:
    """One client with a proxy of its own before the service, so that lanes can be used at the same time."""

    def __init__(self, local: LocalService) -> None:
        self._local = local
        self.change = Change()
        self.trainer: Any = None
        self._stack = AsyncExitStack()

    async def open(self) -> None:
        """Make the clients."""
        plan = [ChangedAnswer(change=self.change)]
        self.proxy = await self._stack.enter_async_context(FaultProxy(to=self._local.base_url, plan=plan))
        self.service = await self._stack.enter_async_context(self.client())
        self.directory = self._stack.enter_context(tempfile.TemporaryDirectory())
        await self.renew()

    async def renew(self) -> None:
        """Make a new run, with a checkpoint of each kind: one whose operation failed may take no others."""
        if self.trainer is not None:
            await self.trainer.close()
        self.trainer = await self.service.create_lora_training_client("echo", rank=2)
        self.sampler = await self.trainer.save_weights_and_get_sampling_client("a")
        await (await self.trainer.save_state("s"))
        checkpoints = await self.trainer.list_checkpoints()
        self.checkpoint = next(one for one in checkpoints if one.checkpoint_id == "s")

    def client(self) -> loops.ServiceClient:
        """Return a client that is not open yet."""
        return loops.ServiceClient(base_url=self.proxy.base_url, api_key=self._local.api_key, on_exit="leave")

    @property
    def secret(self) -> str:
        """What no error may show."""
        return self._local.api_key

    async def close(self) -> None:
        """Close the clients and the proxy."""
        await self._stack.aclose()


class Call(NamedTuple):
    """A call; `breaks` says that its failure may leave the run unusable."""

    name: str
    route: str
    make: Callable[[Lane], Awaitable[Any]]
    breaks: bool = False
    only: str = ""
    """``"dedicated"`` or ``"queued"`` for what exists in that form of the service alone."""


async def _open(lane: Lane) -> None:
    async with lane.client():
        pass


async def _create(lane: Lane) -> None:
    await (await lane.service.create_lora_training_client("echo")).close()


async def _ensure_ready(lane: Lane) -> None:
    await (await lane.service.create_sampling_client("echo")).ensure_ready(1.0)


async def _attach(lane: Lane) -> None:
    await (await lane.service.attach_training_client(lane.trainer.run_id)).close()


async def _attach_sampler(lane: Lane) -> None:
    await lane.service.attach_sampling_client(sampler_id=lane.sampler.sampler_id)


async def _scope(lane: Lane) -> None:
    async with lane.service.training_run("echo"):
        pass


async def _operation(submitted: Awaitable[Awaitable[Any]]) -> None:
    await (await submitted)


async def _download(lane: Lane) -> None:
    with tempfile.TemporaryDirectory(dir=lane.directory) as directory:
        await lane.service.download_checkpoint(lane.checkpoint.id, dest_dir=directory)


async def _sample_many(lane: Lane) -> None:
    async for _ in lane.sampler.sample_many([[1, 2], [3, 4]], sampling_params=PARAMS, keep_errors=True):
        pass


async def _custom(lane: Lane) -> None:
    def loss(_data: Any, logprobs: Any) -> Any:
        return sum(one.sum() for one in logprobs), {}

    await (await lane.trainer.forward_backward_custom([DATUM], loss))


def _plane(lane: Lane) -> loops.ControlPlane:
    return lane.service.control_plane


def _deployment(lane: Lane) -> str:
    return str(lane.trainer.run.deployment_id)


def _sampled(lane: Lane) -> str:
    return f"bt://loops:{lane.trainer.run_id}/sampler_weights/a"


def _path(lane: Lane) -> str:
    return f"bt://loops:{lane.trainer.run_id}/weights/s"


_SUBMIT = "POST /trainers/*"
_POLL = "GET /trainers/*/operations/*"

_OPERATIONS: tuple[tuple[str, Callable[[Lane], Awaitable[Any]]], ...] = (
    ("forward", lambda lane: _operation(lane.trainer.forward([DATUM]))),
    ("forward_backward", lambda lane: _operation(lane.trainer.forward_backward([DATUM]))),
    ("optim_step", lambda lane: _operation(lane.trainer.optim_step(loops.AdamParams()))),
    ("save_state", lambda lane: _operation(lane.trainer.save_state("t"))),
    ("save_weights_for_sampler", lambda lane: _operation(lane.trainer.save_weights_for_sampler("a"))),
    ("load_state", lambda lane: _operation(lane.trainer.load_state(_path(lane)))),
)

_SAMPLES: tuple[tuple[str, Callable[[Lane], Awaitable[Any]]], ...] = (
    ("sample", lambda lane: lane.sampler.sample([1, 2], 2, PARAMS)),
    ("sample with prompt logprobs", lambda lane: lane.sampler.sample([1, 2], 1, PARAMS, True, 2)),
    ("compute_logprobs", lambda lane: lane.sampler.compute_logprobs([1, 2])),
    ("sample_many", _sample_many),
)

CALLS: tuple[Call, ...] = (
    Call("open", "POST /v1/loops/sessions", _open),
    Call(
        "create_lora_training_client",
        "POST /v1/loops/runs",
        _create,
    ),
    Call("create_lora_training_client", "GET */health", _create),
    Call("create_lora_training_client", _POLL, _create),
    Call("create_sampling_client", "POST /v1/loops/samplers", lambda lane: lane.service.create_sampling_client("echo")),
    Call(
        "attach_training_client",
        "GET /v1/loops/runs*",
        _attach,
    ),
    Call("attach_sampling_client", "GET /v1/loops/samplers/*", _attach_sampler),
    Call("training_run", "POST */deactivate", _scope),
    *(Call(name, _SUBMIT, call, breaks=True) for name, call in _OPERATIONS),
    *(Call(name, _POLL, call, breaks=True) for name, call in _OPERATIONS),
    Call("forward_backward_custom", _POLL, _custom, breaks=True),
    Call("policy_version", "GET */policy_version", lambda lane: lane.trainer.policy_version()),
    Call("health", "GET */health", lambda lane: lane.trainer.health()),
    *(Call(name, "POST */sample", call) for name, call in _SAMPLES),
    *(Call(name, "GET */queue/operations/*", call, only="queued") for name, call in _SAMPLES),
    Call(
        "wait_for_version",
        "GET */trainers_policy_version",
        lambda lane: lane.sampler.wait_for_version(0, timeout=1),
        only="dedicated",
    ),
    Call("ensure_ready", "GET /v1/models/*", _ensure_ready, only="dedicated"),
    Call("get_tokenizer", "GET */tokenizer*", lambda lane: lane.trainer.get_tokenizer()),
    Call("download_checkpoint", "GET */checkpoints/*/files", _download),
    Call("download_checkpoint", "GET /files/*", _download),
    Call("list_checkpoints", "GET */checkpoints*", lambda lane: lane.trainer.list_checkpoints()),
    Call("get_server_capabilities", "GET */capabilities", lambda lane: lane.service.get_server_capabilities()),
    Call("get_session", "GET */sessions/*", lambda lane: _plane(lane).get_session(lane.service.session_id)),
    Call("list_runs", "GET */runs*", lambda lane: _plane(lane).list_runs()),
    Call("get_run", "GET */runs/*", lambda lane: _plane(lane).get_run(lane.trainer.run_id)),
    Call("list_samplers", "GET */samplers*", lambda lane: _plane(lane).list_samplers()),
    Call(
        "validate_checkpoint",
        "POST */validate",
        lambda lane: _plane(lane).validate_checkpoint(_sampled(lane)),
    ),
    Call("get_checkpoint_source", "GET */source", lambda lane: _plane(lane).get_checkpoint_source(lane.checkpoint.id)),
    Call("get_user_config", "GET *config*", lambda lane: _plane(lane).get_user_config()),
    Call("list_teams", "GET /v1/teams*", lambda lane: _plane(lane).list_teams()),
    Call("list_deployments", "GET */deployments", lambda lane: _plane(lane).list_deployments()),
    Call(
        "get_deployment",
        "GET */deployments/*",
        lambda lane: _plane(lane).get_deployment(_deployment(lane)),
        only="dedicated",
    ),
    Call(
        "get_deployment_metrics",
        "POST */metrics",
        lambda lane: _plane(lane).get_deployment_metrics(_deployment(lane)),
        only="dedicated",
    ),
    Call(
        "get_deployment_logs",
        "GET */logs*",
        lambda lane: _plane(lane).get_deployment_logs(_deployment(lane)),
        only="dedicated",
    ),
    Call(
        "get_debug_archive_files",
        "GET */debug_archive*",
        lambda lane: _plane(lane).get_debug_archive_files(_deployment(lane)),
        only="dedicated",
    ),
)


async def outcome(lane: Lane, call: Call) -> BaseException | None:
    """Make a call; return the error that it ended in, if it did, and None of one that was still trying."""
    task = asyncio.ensure_future(call.make(lane))
    await asyncio.wait([task], timeout=CASE_SECONDS)
    if not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_SECONDS)
    if not task.done():
        return TimeoutError("the call does not end when it is cancelled")
    return None if task.cancelled() else task.exception()
