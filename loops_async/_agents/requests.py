"""One call in the form that all dialects are translated to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from .._values import place_and_rule
from ..errors import InputError
from ..types import SamplingParams
from .messages import Message
from .records import Route

__all__ = ["AgentRequest", "Sampling", "sampling_problem", "stops_of"]


class AgentRequest(Struct, kw_only=True):
    """What an agent asks for: a reply to `messages`, or to continue `prompt`.

    `params` are those that the request has; `uses_tools` is False where tools are in the prompt and must not be called.
    """

    route: Route
    model: str
    params: dict[str, Any]
    messages: list[Message] = []
    prompt: str | list[int] = ""
    tools: list[dict[str, Any]] = []
    uses_tools: bool = False
    variables: dict[str, Any] = {}
    count: int = 1
    stream: bool = False
    include_usage: bool = False
    wants_logprobs: bool = False
    wants_ids: bool = False


NAMES: Final = SamplingParams.__struct_fields__


class Sampling:
    """The sampling parameters of a gateway: those that fill in, and those that win."""

    def __init__(self, defaults: Mapping[str, Any] | None, force: Mapping[str, Any] | None) -> None:
        self._defaults = {"max_tokens": 1024, **checked_sampling(defaults, "defaults")}
        self._force = checked_sampling(force, "force")

    def of(self, given: Mapping[str, Any]) -> SamplingParams:
        """Return the parameters of a call, given those of a request, which have been checked."""
        return msgspec.convert({**self._defaults, **given, **self._force}, SamplingParams)


def checked_sampling(given: Mapping[str, Any] | None, path: str) -> dict[str, Any]:
    """Return sampling parameters by name, if they are valid.

    Raises:
        InputError: one is unknown, or has a value that is not allowed.
    """
    if given is not None and not isinstance(given, Mapping):
        raise InputError(path, f"must be a dict of sampling parameters; got {given!r:.100}")
    named = dict(given or {})
    if unknown := sorted(set(named) - set(NAMES)):
        raise InputError(path, f"unknown sampling parameter {unknown[0]!r}; there are {', '.join(NAMES)}")
    if problem := sampling_problem(named):
        place, rule = problem
        raise InputError(f"{path}[{place!r}]", f"{rule}; got {named.get(place)!r}")
    return named


def sampling_problem(named: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return which of these sampling parameters is wrong, and the rule; None if all are right."""
    try:
        params = msgspec.convert(named, SamplingParams)
    except msgspec.ValidationError as problem:
        return place_and_rule(problem)
    if "" in stops_of(params):
        return "stop", "an empty text would stop every reply"
    return None


def stops_of(params: SamplingParams) -> Sequence[str]:
    """Return the stop strings."""
    given = [params.stop] if isinstance(params.stop, str) else params.stop or []
    return [stop for stop in given if isinstance(stop, str)]
