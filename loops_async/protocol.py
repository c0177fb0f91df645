"""The wire: names of headers and routes, bodies of the data plane, checkpoint URIs.

Client and embedded service share this module, so that each fact of the wire stands once. The facts are from the
public API reference and from what published clients send and accept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import quote

import msgspec
from msgspec import UNSET, Struct, UnsetType

from .errors import InputError
from .types import AdamParams, Datum
from .types.inputs import Chunk, ExternalRef
from .types.tensors import plain_scalar

_encoder = msgspec.json.Encoder(enc_hook=plain_scalar)
encode: Final = _encoder.encode
"""Makes the JSON of every body that is sent."""
encode_into: Final = _encoder.encode_into
"""The same, at a place in a buffer; -1 is its end."""

# --- headers ---------------------------------------------------------------------------------------------------------

IDEMPOTENCY_KEY: Final = "Idempotency-Key"
RUN_ID: Final = "X-Run-Id"
SAMPLER_ID: Final = "X-Sampler-Id"
MIN_POLICY_VERSION: Final = "X-Min-Policy-Version"
CHECKPOINT_PATH: Final = "X-Checkpoint-Path"
AFFINITY: Final = "X-Baseten-Session-ID"
ACCEPT_ERROR: Final = "X-Baseten-Accept-Error"
ERROR_SOURCE: Final = "X-Baseten-Error-Source"
ERROR_CODE: Final = "X-Baseten-Error-Code"
POLICY_VERSION: Final = "x-trainers-policy-version"

# --- numbers ---------------------------------------------------------------------------------------------------------

POLL_HOLD_SECONDS: Final = 30.0
"""How long the service holds a poll of an operation before it answers 408."""

MAX_REQUEST_BYTES: Final = 24 * 1024 * 1024
"""Largest body of one training request."""

SCHEMA_VERSION: Final = 1

# --- words -----------------------------------------------------------------------------------------------------------

SAMPLER_READY: Final = "ACTIVE"
SCALED_TO_ZERO: Final = "SCALED_TO_ZERO"
SAMPLER_TERMINAL: Final = frozenset(
    {"DEPLOY_FAILED", "UNHEALTHY", "BUILD_FAILED", "BUILD_STOPPED", "DEACTIVATING", "INACTIVE", "FAILED"}
)
TRAINER_TERMINAL: Final = frozenset({"FAILED", "STOPPED", "PREEMPTED"})

# --- operations of a trainer -----------------------------------------------------------------------------------------


class InitTrainerServerBody(Struct, kw_only=True):
    """``POST /init_trainer_server``: start from a fresh adapter of this rank."""

    lora_rank: int
    base_model: str
    seq_id: int | None = None
    run_id: str | None = None
    model: str | None = None


class ForwardBody(Struct, kw_only=True):
    """``POST /forward`` and ``POST /forward_backward``."""

    data: list[Datum]
    loss_fn: str = "cross_entropy"
    loss_fn_config: dict[str, Any] | None = None
    seq_id: int | None = None
    run_id: str | None = None
    top_k_logprobs: int = 0
    model: str | None = None


class OptimStepBody(Struct, kw_only=True):
    """``POST /optim_step``."""

    adam_params: AdamParams
    seq_id: int | None = None
    run_id: str | None = None
    model: str | None = None


class SaveStateBody(Struct, kw_only=True):
    """``POST /save_state``."""

    name: str
    ttl_seconds: int | None = None
    run_id: str | None = None
    seq_id: int | None = None
    model: str | None = None


class SaveWeightsForSamplerBody(Struct, kw_only=True):
    """``POST /save_weights_for_sampler``: `bump_version` true publishes to the paired sampler, false only stages."""

    name: str
    ttl_seconds: int | None | UnsetType = UNSET
    run_id: str | None = None
    seq_id: int | None = None
    bump_version: bool = True
    model: str | None = None


class LoadStateBody(Struct, kw_only=True):
    """``POST /load_state`` and ``POST /load_state_with_optimizer``."""

    path: str
    run_id: str | None = None
    seq_id: int | None = None
    model: str | None = None


class Accepted(Struct, kw_only=True):
    """Body of the 202 that accepts an operation."""

    operation_id: str
    schema_version: int = SCHEMA_VERSION


class PolicyVersion(Struct, kw_only=True):
    """Body of ``GET /policy_version`` and ``GET /trainers_policy_version``."""

    policy_version: int | None = None


# --- losses ----------------------------------------------------------------------------------------------------------


class LossRule(Struct, frozen=True, kw_only=True):
    """What a loss needs of each datum, and the settings that it knows with their types."""

    required: tuple[str, ...] = ()
    config: Mapping[str, type] = {}
    group: int = 1
    """Neighbours that belong together: 2 for the (chosen, rejected) pairs of dpo."""


_ON_POLICY: Final = ("logprobs", "advantages")
CLIP_DEFAULTS: Final = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_CLIP: Final = dict.fromkeys(CLIP_DEFAULTS, float)

LOSSES: Final[dict[str, LossRule]] = {
    "cross_entropy": LossRule(config={"skip_token_normalization": bool}),
    "importance_sampling": LossRule(required=_ON_POLICY),
    "ppo": LossRule(required=_ON_POLICY, config=_CLIP),
    "dppo": LossRule(
        required=_ON_POLICY,
        config={"dppo_mask_high": float, "dppo_mask_low": float, "adv_tau": float, "kl_tau": float},
    ),
    "cispo": LossRule(required=_ON_POLICY, config=_CLIP),
    "dro": LossRule(required=_ON_POLICY, config={"beta": float}),
    "dpo": LossRule(
        required=("target_tokens", "weights", "ref_logprobs"),
        config={"beta": float, "label_smoothing": float},
        group=2,
    ),
}
"""Every loss of the wire (data-plane reference 2.4)."""

# --- sampling --------------------------------------------------------------------------------------------------------


class SampleBody(Struct, kw_only=True, gc=False):
    """``POST /sample``, in the manner of OpenAI completions.

    ``logprobs: 0`` asks for the chosen token's logprob only; ``prompt_logprobs: K`` for the prompt's, with the K best.
    """

    prompt: list[int]
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    logprobs: int | None = 0
    return_tokens_as_token_ids: bool = True
    model_input_chunks: list[Chunk] | UnsetType = UNSET
    return_token_ids: bool | UnsetType = UNSET
    prompt_logprobs: int | None | UnsetType = UNSET
    max_tokens: int | None | UnsetType = UNSET
    seed: int | None | UnsetType = UNSET
    top_k: int | UnsetType = UNSET
    stop: str | list[str] | None | UnsetType = UNSET
    stop_token_ids: list[int] | UnsetType = UNSET
    structured_outputs: dict[str, Any] | None | UnsetType = UNSET
    include_routed_experts: bool | UnsetType = UNSET
    model: str | None | UnsetType = UNSET
    lora: str | None | UnsetType = UNSET


class PromptLogprob(Struct):
    """What the sampler says of one candidate at one prompt position."""

    logprob: float | None = None
    rank: int | None = None
    decoded_token: str | None = None


PromptLogprobs: TypeAlias = list[dict[str, PromptLogprob] | None]


class ChoiceLogprobs(Struct):
    """Tokens of a completion (``"token_id:<int>"`` or ints) and their logprobs."""

    tokens: list[str | int] = []
    token_logprobs: list[float | None] = []


class ChoiceBase(Struct, kw_only=True):
    """What every completion has."""

    index: int = 0
    text: str | None = None
    finish_reason: str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    routed_experts_ref: ExternalRef | None = None


class Choice(ChoiceBase, kw_only=True):
    """One completion."""

    logprobs: ChoiceLogprobs | None = None
    token_ids: list[int] | None = None


class Completions(Struct, kw_only=True):
    """Body of the answer to ``POST /sample``."""

    choices: list[Choice]


class ServedModel(Struct):
    """An entry of ``GET /v1/models``; the base model has no `parent`, an adapter does.

    `tokenizer` is our own: where the embedded service serves the tokenizer's files, relative to the sampler's root.
    """

    id: str
    parent: str | None = None
    tokenizer: str | None = None


class ServedModels(Struct):
    """Body of ``GET /v1/models``."""

    data: list[ServedModel] = []


# --- checkpoint URIs -------------------------------------------------------------------------------------------------

CheckpointKind: TypeAlias = Literal["weights", "sampler_weights"]

_CHECKPOINT_URI = re.compile(r"bt://loops:(?P<run>[A-Za-z0-9_-]+)/(?P<kind>weights|sampler_weights)/(?P<name>[^/]+)/?")
_NAME_RULE = "a checkpoint name is 1 to 255 characters, without '/', '\\', control characters, and not '.' or '..'"


class CheckpointUri(Struct, frozen=True):
    """``bt://loops:<run_id>/(weights|sampler_weights)/<name>``; ``weights`` resume, ``sampler_weights`` serve.

    Example:
        >>> from loops_async.protocol import CheckpointUri
        >>> CheckpointUri.parse("bt://loops:e3mvjo3/sampler_weights/step-1").name
        'step-1'
    """

    run_id: str
    kind: CheckpointKind
    name: str

    @classmethod
    def parse(cls, uri: str, *, kind: CheckpointKind | None = None, path: str = "path") -> CheckpointUri:
        """Parse a URI; `kind` is the kind that the caller can use, `path` the argument's name in errors."""
        match = _CHECKPOINT_URI.fullmatch(uri) if isinstance(uri, str) else None
        if match is None:
            raise InputError(
                path, f"must be bt://loops:<run_id>/{kind or '(weights|sampler_weights)'}/<name>; got {uri!r}"
            )
        check_checkpoint_name(match["name"], path=path)
        if kind is not None and match["kind"] != kind:
            raise InputError(path, f"must be a '{kind}' checkpoint; got {uri!r}")
        return cls(match["run"], "weights" if match["kind"] == "weights" else "sampler_weights", match["name"])

    def __str__(self) -> str:
        return f"bt://loops:{self.run_id}/{self.kind}/{self.name}"


def check_checkpoint_name(name: str, *, path: str = "name") -> str:
    """Return `name` when a checkpoint may be called so; it becomes a path segment and a directory."""
    fits = isinstance(name, str) and 1 <= len(name) <= 255 and name not in (".", "..")
    if not fits or any(c in "/\\" or not c.isprintable() for c in name):
        raise InputError(path, f"{_NAME_RULE}; got {name!r}")
    return name


def segment(value: str) -> str:
    """Escape an id for use as one segment of a URL path."""
    return quote(value, safe="")


# `msgspec` resolves annotations lazily; asking once here makes a mistake an import error.
for _body in (ForwardBody, SampleBody, Completions):
    msgspec.json.Decoder(_body)
