"""The gateway that agents call, and the rollout that each of them is."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from secrets import token_urlsafe
from types import TracebackType
from typing import Any, Final, Literal, TypeAlias, get_args
from uuid import uuid4

import msgspec

from .._arguments import as_config_errors, check_at_least, check_not_negative
from .._kinds import is_mapping
from .._tasks import run_to_completion
from ..errors import ClosedError, ConfigError, InputError
from ..sampling import SamplingClient
from ..types import Datum, ModelInput, SampleResponse, SamplingParams
from .clients import Clients, Package
from .parsers import PARSERS, ToolParser, parser_for
from .prompts import History, Prompter
from .recorder import Kit, Recorder, Sample
from .records import AgentCall, shown
from .requests import Sampling
from .server import LOOPBACK, Door, Server
from .templates import OWN_RULE, OWN_VARIABLES, ChatTemplate
from .tokens import Tokens
from .trajectories import Trajectory, datums_of, trajectories_of
from .worker import LONG_TEXT, Worker

__all__ = ["AgentGateway", "AgentRollout", "check_gateway_options", "gateway_rollout", "shut_rollout"]

LARGEST_PORT: Final = 65_535

Sampler: TypeAlias = Callable[[], Sample]
"""Returns what samples for a call that begins now."""


class AgentRollout:
    """One rollout of an agent: an address and a key of its own, and the record of the calls made with them.

    Made by `AgentGateway.rollout`, which opens it; `close`, or the end of a ``with`` block, closes it. The record
    stays. `reward` is for you to use; the library does not read it.
    """

    def __init__(self, url: str, door: Door, recorder: Recorder) -> None:
        self._reward: float | None = None
        self._id = f"rollout-{uuid4().hex}"
        self._url = url
        self._key = f"sk-loops-{token_urlsafe(32)}"
        self._door = door
        self._recorder = recorder
        self._clients = Clients({"openai": self.base_url, "anthropic": self._root}, self._key)
        door.add(self._key, self._id, recorder)

    @property
    def id(self) -> str:
        """The id of the rollout."""
        return self._id

    @property
    def base_url(self) -> str:
        """The address for clients of OpenAI's API: ``http://127.0.0.1:PORT/r/ID/v1``."""
        return f"{self._root}/v1"

    @property
    def api_key(self) -> str:
        """The key for this rollout alone, which no record, log line or error contains."""
        return self._key

    @property
    def reward(self) -> float | None:
        """The reward, once you have set it."""
        return self._reward

    @reward.setter
    def reward(self, reward: float | None) -> None:
        self._reward = reward

    def env(self) -> dict[str, str]:
        """Return the variables by which child processes find the rollout: the URL and the key of both APIs."""
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_API_KEY": self._key,
            "ANTHROPIC_BASE_URL": self._root,
            "ANTHROPIC_API_KEY": self._key,
        }

    @property
    def _root(self) -> str:
        return f"{self._url}/r/{self._id}"

    def openai_client(self, *, blocking: bool = False) -> Any:
        """Return a client of the package `openai` for this rollout, which is closed with it.

        It is an ``openai.AsyncOpenAI``; with ``blocking=True`` an ``openai.OpenAI``, e.g. for ``asyncio.to_thread``.

        There is one for each rollout, which takes half a millisecond to make. It uses no proxy. The first one in a
        program imports the package, which takes seconds, unless that was done before.

        Args:
            blocking: whether it is to be for code that blocks.

        Raises:
            ImportError: the package is not installed: ``pip install openai``.
            ClosedError: the rollout is closed.
        """
        return self._client("openai", blocking=blocking)

    def anthropic_client(self, *, blocking: bool = False) -> Any:
        """Return a client of the package `anthropic` for this rollout; all else is as with `openai_client`.

        It is an ``anthropic.AsyncAnthropic``; with ``blocking=True`` an ``anthropic.Anthropic``.

        Args:
            blocking: whether it is to be for code that blocks.

        Raises:
            ImportError: the package is not installed: ``pip install anthropic``.
            ClosedError: the rollout is closed.
        """
        return self._client("anthropic", blocking=blocking)

    def _client(self, package: Package, *, blocking: bool) -> Any:
        if self.closed:
            raise ClosedError("this rollout is closed, so that no client can use it")
        return self._clients.get(package, blocking=blocking)

    @property
    def calls(self) -> list[AgentCall]:
        """Every call so far, in the order of their arrival."""
        return list(shown(list(self._recorder.calls)).values())

    @property
    def closed(self) -> bool:
        """Whether the rollout accepts no further call."""
        return self._recorder.is_closed

    def trajectories(
        self, *, merge: bool = True, select: Callable[[AgentCall], bool] | None = None
    ) -> list[Trajectory]:
        """Return what was sampled so far, as sequences of tokens; also after closing.

        Args:
            merge: join the calls that continue each other: one sequence for each last call of a conversation. Of
                sequences that share calls, the first one trains them. False: one sequence for each call.
            select: says which calls to train on; it may look at anything in them, e.g. `AgentCall.model`. None: all.
        """
        return trajectories_of(list(self._recorder.calls), merge=merge, select=select)

    def to_datums(
        self,
        advantage: float | Mapping[str, float] | Callable[[str], float] = 0.0,
        *,
        merge: bool = True,
        select: Callable[[AgentCall], bool] | None = None,
    ) -> list[Datum]:
        """Return the training examples, in which every sampled token is trained exactly once; also after closing.

        Args:
            advantage: of each sampled token: a number, a mapping from the id of a call, or a function of it.
            merge: as in `trajectories`.
            select: as in `trajectories`.

        Raises:
            InputError: the advantage of a call is missing or not finite.
        """
        return datums_of(self.trajectories(merge=merge, select=select), advantage)

    async def close(self) -> None:
        """Accept no further call, and cancel those that run: at the sampler, too. Repeating it is harmless."""
        await self._shut()
        await self._clients.close()

    async def _shut(self) -> None:
        self._door.remove(self._key)
        await self._recorder.close()

    async def __aenter__(self) -> AgentRollout:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<AgentRollout {self._id}, {state}, {len(self._recorder.calls)} calls>"


class AgentGateway:
    """An HTTP server on this machine with which any program that speaks OpenAI's or Anthropic's API is a rollout.

    It answers with samples of `sampler`, and records every call token for token: a conversation that goes on continues
    the tokens that were sampled, never a text that is encoded again. So the agent needs no change, and its calls become
    training examples. Needs the extra ``agents``.

    The server runs on the event loop in which the gateway was entered. So an agent that blocks belongs in
    ``asyncio.to_thread``: on that event loop, it would block the server whose answer it waits for.

    Args:
        sampler: what answers. `sampler` can be assigned later; a call uses the one that is set when it begins.
        tokenizer: that of the model; None: the sampler's, loaded when the gateway is entered.
        chat_template: a Jinja template; None: the tokenizer's own.
        template_kwargs: variables of the template, e.g. ``{"enable_thinking": False}``; those in a request's
            ``chat_template_kwargs`` win.
        tool_parser: how tool calls are written: ``"hermes"``, ``"llama3_json"``, ``"mistral"``, an object with ``name``
            and ``parse``, or ``"auto"``: as the template suggests.
        end_tokens: the tokens that end an assistant's turn; None: all tokens of the tokenizer that are known to do so.
        history: ``"template"``: where the template drops a part of what came before, e.g. the reasoning, a call begins
            a new sequence. ``"keep"``: that part is kept, so that a conversation is one sequence, although the model
            may not have been trained on such a context.
        defaults: sampling parameters for requests without them; ``max_tokens`` is 1024 unless given here.
        force: sampling parameters that win over the request's. To train, sample with ``{"temperature": 1.0, "top_p":
            1.0}``, since the recorded logprobs are always those of the plain distribution.
        ignore: fields of requests to accept without effect, where they would be refused.
        max_context: the most tokens of prompt and reply together: cuts ``max_tokens``, and refuses longer prompts.
        host: a name of this machine's loopback; remote sandboxes need a tunnel to it.
        port: 0: any that is free.
        max_body: the largest request in bytes.
        stream_wait: seconds that a stream waits for its answer before it begins; then, an error is sent as an event.
        grace: seconds for which a call continues after its connection was lost, so that a retry can join it.

    Raises:
        ConfigError: an argument is wrong.

    Example:
        ::

            async with loops.AgentGateway(sampler, force={"temperature": 1.0, "top_p": 1.0}) as gateway:
                async with gateway.rollout() as rollout:
                    reward = await my_agent(rollout.base_url, rollout.api_key, task)
                datums = rollout.to_datums(advantage=reward - baseline)
    """

    def __init__(
        self,
        sampler: SamplingClient,
        *,
        tokenizer: Any = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        tool_parser: str | ToolParser = "auto",
        end_tokens: Sequence[str] | None = None,
        history: Literal["template", "keep"] = "template",
        defaults: Mapping[str, Any] | None = None,
        force: Mapping[str, Any] | None = None,
        ignore: Collection[str] = (),
        max_context: int | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        max_body: int = 67_108_864,
        stream_wait: float = 15.0,
        grace: float = 5.0,
    ) -> None:
        self._tokenizer = tokenizer
        with as_config_errors():
            self._template: str | None = _checked_template(chat_template)
            self._variables: dict[str, Any] = _checked_variables(template_kwargs)
            self._sampler: SamplingClient = _checked_sampler(sampler)
            self._parser: ToolParser | None = _checked_parser(tool_parser)
            self._end_tokens: list[str] | None = _checked_names(end_tokens, "end_tokens")
            self._history: History = _checked_history(history)
            self._sampling: Sampling = Sampling(defaults, force)
            self._max_context: int | None = _at_least(max_context, 1, "max_context")
            self._grace: float = check_not_negative(grace, "grace")
            self._host: str = _checked_host(host)
            self._wanted_port: int = _checked_port(port)
            self._door: Door = Door()
            self._server: Server = Server(
                self._door,
                ignore=_checked_names(ignore, "ignore") or (),
                stream_wait=check_not_negative(stream_wait, "stream_wait"),
                max_body=check_at_least(max_body, 1, "max_body"),
                base_model=lambda: self._sampler.get_base_model(),
            )
        self._rollouts: list[AgentRollout] = []
        self._kit: Kit | None = None
        self._port = 0
        self._stop: Callable[[], Awaitable[None]] | None = None

    @property
    def url(self) -> str:
        """The address of the server: ``http://127.0.0.1:PORT``. Clients need that of a rollout."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    @property
    def port(self) -> int:
        """The port of the server."""
        self._opened()
        return self._port

    @property
    def sampler(self) -> SamplingClient:
        """What answers calls that begin from now on, unless their rollout has its own."""
        return self._sampler

    @sampler.setter
    def sampler(self, sampler: SamplingClient) -> None:
        with as_config_errors():
            self._sampler = _checked_sampler(sampler)

    def rollout(
        self,
        *,
        sampler: SamplingClient | None = None,
        affinity_key: str | None = None,
        max_calls: int | None = None,
    ) -> AgentRollout:
        """Open a rollout; there may be hundreds at once.

        Args:
            sampler: what answers its calls; None: the gateway's, whichever it is when a call begins.
            affinity_key: what its requests have in common, so that they reach the same replica; None: its own id.
                Rollouts of one task should share a key.
            max_calls: how many calls it may make; further ones are refused. None: any number.

        Raises:
            ClosedError: the gateway is not open.
            ConfigError: an argument is wrong.
        """
        with as_config_errors():
            own = None if sampler is None else _checked_sampler(sampler)
            own_key: Any = affinity_key
            if own_key is not None and not (isinstance(own_key, str) and own_key and own_key.isprintable()):
                raise InputError("affinity_key", f"must be a printable text; got {affinity_key!r}")
            most = _at_least(max_calls, 0, "max_calls")
        key = affinity_key or uuid4().hex
        return self._rollout(lambda: _sample_with(own or self._sampler, key), most)

    def _rollout(self, sample: Sampler, most: int | None) -> AgentRollout:
        kit = self._opened()
        rollout = AgentRollout(self.url, self._door, Recorder(kit, sample, most))
        self._rollouts = [*(each for each in self._rollouts if not each.closed), rollout]
        return rollout

    async def __aenter__(self) -> AgentGateway:
        if self._stop is not None:
            raise ClosedError("this gateway is open")
        self._kit = await self._new_kit()
        self._port, self._stop = await self._server.start(self._host, self._wanted_port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await run_to_completion(self._close())

    async def _close(self) -> None:
        stop, self._stop, self._kit = self._stop, None, None
        for rollout in self._rollouts:
            await rollout.close()
        if stop is not None:
            await stop()

    async def _new_kit(self) -> Kit:
        tokenizer = await self._sampler.get_tokenizer() if self._tokenizer is None else self._tokenizer
        worker = Worker()
        # To compile a template takes long, too.
        return await worker.run(LONG_TEXT, self._kit_with, tokenizer, worker)

    def _kit_with(self, tokenizer: Any, worker: Worker) -> Kit:
        tokens = Tokens(tokenizer, self._end_tokens, worker)
        template = ChatTemplate(self._template or tokens.chat_template, tokens.names)
        return Kit(
            tokens=tokens,
            prompter=Prompter(tokens, template, self._history, worker),
            parser=parser_for(template.text) if self._parser is None else self._parser,
            sampling=self._sampling,
            variables=self._variables,
            max_context=self._max_context,
            grace=self._grace,
        )

    def _opened(self) -> Kit:
        if self._kit is None:
            raise ClosedError("the gateway is not open: use it inside its ``with`` block")
        return self._kit

    def __repr__(self) -> str:
        state = f"port {self._port}" if self._kit is not None else "not open"
        return f"<AgentGateway {state}, {sum(not each.closed for each in self._rollouts)} open rollouts>"


def gateway_rollout(gateway: AgentGateway, sample: Sampler) -> AgentRollout:
    """Open a rollout whose calls are sampled in another way than with the gateway's sampler."""
    return gateway._rollout(sample, None)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - for `_rollouts`


async def shut_rollout(rollout: AgentRollout) -> None:
    """Do what closes a rollout, but for its clients: an agent that still runs gets the answer that it is closed."""
    await rollout._shut()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - for `_rollouts`


def check_gateway_options(options: Any) -> dict[str, Any]:
    """Return the keyword arguments of a gateway, once they have passed its checks.

    Raises:
        ConfigError: one is unknown or wrong.
    """
    known = inspect.signature(AgentGateway).parameters.keys() - {"sampler"}
    if not is_mapping(options):
        raise ConfigError(f"agents: must be keyword arguments of AgentGateway, e.g. {{}}; got {options!r}")
    named: dict[str, Any] = dict(options)
    if unknown := sorted(named.keys() - known):
        raise ConfigError(f"agents: AgentGateway has no argument {unknown[0]!r}, only {', '.join(sorted(known))}")
    AgentGateway(SamplingClient.__new__(SamplingClient), **named)  # of the sampler, it looks at the class only
    return named


def _sample_with(sampler: SamplingClient, affinity_key: str) -> Sample:
    """Return what samples with one client, whatever becomes of the gateway's."""

    async def sample(prompt: list[int], count: int, params: SamplingParams) -> SampleResponse:
        return await sampler.sample(ModelInput.from_ints(prompt), count, params, affinity_key=affinity_key)

    return sample


# --- arguments -------------------------------------------------------------------------------------------------------


def _checked_sampler(sampler: Any) -> SamplingClient:
    if not isinstance(sampler, SamplingClient):
        raise InputError("sampler", f"expected a SamplingClient, got {type(sampler).__name__}")
    return sampler


def _checked_template(template: Any) -> str | None:
    if template is None or isinstance(template, str):
        return template
    raise InputError("chat_template", f"must be a Jinja text; got {type(template).__name__}")


def _checked_variables(variables: Any) -> dict[str, Any]:
    """Return the variables of the template, if they have a place in JSON, by which calls are compared."""
    if variables is None:
        return {}
    try:
        msgspec.json.encode(variables, order="sorted")
        given: dict[str, Any] = dict(variables)
    except (TypeError, ValueError) as problem:
        raise InputError("template_kwargs", f"must be a dict of JSON values: {problem}") from None
    for own in OWN_VARIABLES:
        if own in given:
            raise InputError(f"template_kwargs[{own!r}]", OWN_RULE)
    return given


def _checked_parser(parser: Any) -> ToolParser | None:
    """Return the parser; None where the template is to suggest one."""
    if parser == "auto":
        return None
    if isinstance(parser, str):
        if parser not in PARSERS:
            allowed = ", ".join(map(repr, PARSERS))
            raise InputError("tool_parser", f"must be 'auto', {allowed} or an object; got {parser!r}")
        return PARSERS[parser]
    if not isinstance(parser, ToolParser):
        raise InputError("tool_parser", f"needs `name` and `parse`; got {type(parser).__name__}")
    return parser


def _checked_history(history: History) -> History:
    if history in get_args(History):
        return history
    raise InputError("history", f"must be 'template' or 'keep'; got {history!r}")


def _checked_host(host: Any) -> str:
    if host in LOOPBACK:
        return str(host)
    raise InputError(
        "host",
        f"must be one of {', '.join(LOOPBACK)}, since the server is for programs on this machine; a remote sandbox "
        f"needs a tunnel. Got {host!r}",
    )


def _checked_port(port: Any) -> int:
    if check_at_least(port, 0, "port") > LARGEST_PORT:
        raise InputError("port", f"must be at most {LARGEST_PORT}; got {port!r}")
    return int(port)


def _checked_names(names: Any, path: str) -> list[str] | None:
    try:
        checked: list[str] | None = msgspec.convert(names, list[str] | None)
    except msgspec.ValidationError:
        raise InputError(path, f"must be a list of names; got {names!r}") from None
    return checked


def _at_least(value: Any, smallest: int, path: str) -> int | None:
    return None if value is None else check_at_least(value, smallest, path)
