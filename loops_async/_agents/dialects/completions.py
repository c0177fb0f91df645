"""``POST completions``: a text or token ids, and what follows them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Annotated, Any, Final, TypeAlias

from msgspec import Meta

from ...types.tensors import is_list_like
from ..errors import bad_request
from ..records import Call
from ..requests import AgentRequest
from .base import Answer, Body, Dialect, Fields, checked, content_of, event
from .chat import DONE, NEUTRAL, SAMPLING, most_samples, structured_outputs, usage

__all__ = ["Completions"]

REFUSED: Final = {**NEUTRAL, "suffix": ("",)}

TokenId: TypeAlias = Annotated[int, Meta(ge=0, lt=2**31)]


class Completions(Dialect):
    """The dialect of completions."""

    route = "completions"
    path = "completions"

    def read(self, fields: Fields) -> AgentRequest:
        fields.refuse(REFUSED)
        options = fields.get("stream_options", dict[str, Any], {})
        return AgentRequest(
            route=self.route,
            model=fields.get("model", str, ""),
            prompt=_prompt(fields.needed_any("prompt")),
            params={**fields.sampling(SAMPLING), **structured_outputs(fields)},
            count=most_samples(fields),
            stream=fields.get("stream", bool, False),
            include_usage=options.get("include_usage") is True,
            wants_logprobs=_wants_logprobs(fields),
            wants_ids=fields.get("return_token_ids", bool, False),
        )

    def answer(self, answer: Answer) -> Body:
        choices = [_choice(answer, index, call) for index, call in enumerate(answer.calls)]
        return {**_head(answer), "choices": choices, "usage": usage(answer)}

    def events(self, answer: Answer) -> Iterator[bytes]:
        for index, call in enumerate(answer.calls):
            yield event({**_head(answer), "choices": [_choice(answer, index, call)]})
        if answer.request.include_usage:
            yield event({**_head(answer), "choices": [], "usage": usage(answer)})
        yield DONE


def _head(answer: Answer) -> Body:
    return {"id": answer.id, "object": "text_completion", "created": answer.created, "model": answer.request.model}


def _prompt(given: Any) -> str | list[int]:
    if isinstance(given, str):
        prompt: str | list[int] = given
    elif _holds(given, str | list):
        if len(given) > 1:
            raise bad_request("prompt", "only one prompt is served at a time", "unsupported_value")
        prompt = given[0] if isinstance(given[0], str) else checked(given[0], list[TokenId], "prompt[0]")
    else:
        prompt = checked(given, list[TokenId], "prompt")
    if not prompt:
        raise bad_request("prompt", "must not be empty")
    return prompt


def _holds(given: Any, kind: Any) -> bool:
    """Whether this is a list with such a thing."""
    return is_list_like(given) and any(isinstance(each, kind) for each in given)


def _wants_logprobs(fields: Fields) -> bool:
    """Whether logprobs are asked for: their number, of which only that of the sampled token is served."""
    given = fields.any("logprobs")
    if given is None or given is False:
        return False
    if given is True or given in (0, 1):
        return True
    raise bad_request("logprobs", f"only 0 and 1 are served; got {given!r}", "unsupported_value")


def _choice(answer: Answer, index: int, call: Call) -> Body:
    reason = "length" if call.stop_reason == "length" else "stop"
    choice: Body = {"index": index, "text": content_of(call), "finish_reason": reason, "logprobs": None}
    if answer.request.wants_logprobs:
        pieces = answer.pieces[index]
        offsets = list(accumulate(map(len, pieces), initial=0))[:-1]
        choice["logprobs"] = {
            "tokens": pieces,
            "token_logprobs": call.logprobs,
            "top_logprobs": None,
            "text_offset": offsets,
        }
    if answer.request.wants_ids:
        choice |= {"prompt_token_ids": call.prompt.tokens(), "token_ids": call.tokens}
    return choice
