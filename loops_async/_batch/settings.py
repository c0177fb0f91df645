"""What decides the answers of a batch, and the file beside the output that says so."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from hashlib import blake2b
from typing import Annotated, Any, Final, Protocol

import msgspec
from msgspec import Meta, Struct

from .._arguments import check_kind
from .._http.decoding import UnreadableError, decode_json
from .._kinds import is_list, is_mapping
from .._values import Value
from ..errors import InputError
from ..types import SamplingParams

DIGEST_BYTES: Final = 16


class BatchClient(Protocol):
    """A sampling client of either form, as far as `BatchSettings.of` needs it."""

    @property
    def checkpoint_path(self) -> str | None:
        """The checkpoint that it samples."""
        ...

    @property
    def run_id(self) -> str | None:
        """The run whose weights it samples."""
        ...

    def get_base_model(self) -> str:
        """Return the name of the base model."""
        ...


# `dict=True` gives `cached_property` a place to store its value.
class BatchSettings(Value, Struct, frozen=True, kw_only=True, dict=True):
    """What decides the answers of a batch, and nothing that changes when a job or a sampler is started again.

    `run_id` stands for the weights of a run where they are no checkpoint. `digest` identifies the settings: it is in
    each record, and a part of each key. The other fields are arguments of `SamplingClient.sample`.

    Example:
        ::

            settings = loops.BatchSettings.of(sampler, num_samples=4, sampling_params=params)
    """

    base_model: str
    checkpoint_path: str | None = None
    run_id: str | None = None
    num_samples: Annotated[int, Meta(ge=1)] = 1
    sampling_params: SamplingParams = SamplingParams()
    include_prompt_logprobs: bool = False
    topk_prompt_logprobs: Annotated[int, Meta(ge=0)] = 0

    @classmethod
    def of(
        cls,
        client: BatchClient,
        *,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> BatchSettings:
        """Return the settings of a batch that `client` samples; the other arguments are those of its `sample`."""
        checkpoint_path = client.checkpoint_path
        settings = cls(
            base_model=client.get_base_model(),
            checkpoint_path=checkpoint_path,
            run_id=client.run_id if checkpoint_path is None else None,
            num_samples=num_samples,
            sampling_params=SamplingParams() if sampling_params is None else sampling_params,
            include_prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
        )
        return checked(settings)

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits: the BLAKE2b-128 of the fields that are not None, as canonical JSON."""
        # A field that a later version adds, and that is None there, leaves the digests of this one as they are.
        return digest_of(canonical(checked(self).to_dict()))


def checked(settings: BatchSettings) -> BatchSettings:
    """Return the settings in plain values if all are allowed.

    Raises:
        InputError: one is not; or both `run_id` and `checkpoint_path` are given.
    """
    settings = check_kind(settings, BatchSettings, "settings")
    if settings.run_id is not None and settings.checkpoint_path is not None:
        raise InputError("settings.run_id", "must not be given with checkpoint_path, which says what is sampled")
    return settings


def digest_of(*parts: bytes) -> str:
    """Return the BLAKE2b-128 of the parts, as 32 hexadecimal digits."""
    return blake2b(b"".join(parts), digest_size=DIGEST_BYTES).hexdigest()


def canonical(value: Any) -> bytes:
    """Return the JSON of a value with sorted names, without those whose value is null.

    A table has null where a row has no such field, and JSON lines have nothing: both are the same row.
    """
    return msgspec.json.encode(_without_nulls(value), order="sorted")


def _without_nulls(value: Any) -> Any:
    if is_mapping(value):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    if is_list(value) and any(isinstance(each, Mapping | list) for each in value):
        return [_without_nulls(each) for each in value]
    return value


# --- the file beside the output ---


def settings_file(settings: BatchSettings, before: bytes | None) -> bytes:
    """Return the content of the file beside an output: the settings and their digest, then those of `earlier` runs.

    `before` is its content before this run.
    """
    known = _described(before)
    known.pop(settings.digest, None)
    content = {"digest": settings.digest, **settings.to_dict()}
    if known:
        content["earlier"] = [{"digest": digest, **each} for digest, each in known.items()]
    return msgspec.json.format(msgspec.json.encode(content)) + b"\n"


def check_settings(
    settings: BatchSettings, found: Collection[str], before: bytes | None, *, append: bool, target: str
) -> None:
    """Refuse to continue an output with records of other settings, and name what differs.

    Args:
        settings: those of this run.
        found: the digests in the records of the output.
        before: the content of the file beside the output, if there is one.
        append: keep records of other settings, and add to them.
        target: how the message names the output.

    Raises:
        InputError: the output has records of other settings, and `append` is False.
    """
    others = sorted(digest for digest in found if digest != settings.digest)
    if not others or append:
        return
    known = _described(before)
    there = known.get(others[-1])
    if there is None:
        differences = f"their digest is {others[-1]}, and the file beside it does not say more"
    else:
        differences = "; ".join(_differences(there, settings.to_dict()))
    raise InputError(
        target,
        f"was made with other settings: {differences}. Choose another output, or keep both: append=True. "
        "Nothing was sent or changed",
    )


def _described(content: bytes | None) -> dict[str, dict[str, Any]]:
    """Return the settings that a file describes, by their digests, the newest first."""
    try:
        newest = decode_json(content or b"{}", dict[str, Any])
        earlier = msgspec.convert(newest.pop("earlier", []), list[dict[str, Any]])
    except (UnreadableError, msgspec.ValidationError):  # it only explains; the records themselves decide
        return {}
    return {str(each.pop("digest")): each for each in (newest, *earlier) if "digest" in each}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    before, now = dict(_flat(there)), dict(_flat(here))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield f"{name} was {_shown(before.get(name))} and is now {_shown(now.get(name))}"


def _flat(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if name == "sampling_params" and is_mapping(value):
            yield from value.items()
        else:
            yield name, value


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()[:100]
