"""The wire protocol: header names, limits, bodies of the data plane, rules of the losses, checkpoint URIs.

Client and embedded service share this module, so that each fact of the protocol is defined once. Sources are the public
API reference and the requests and answers of published clients.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias
from urllib.parse import quote

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from .errors import InputError
from .types import AdamParams, Datum, ModelInput, TensorData
from .types.identifiers import GivenId
from .types.inputs import Chunk, ExternalRef
from .types.tensors import plain_number, plain_scalar

_encoder = msgspec.json.Encoder(enc_hook=plain_scalar)
encode: Final = _encoder.encode
"""Encodes any request body as JSON."""
encode_into: Final = _encoder.encode_into
"""Encodes into a buffer at an offset; -1 appends."""

# --- headers ---------------------------------------------------------------------------------------------------------

IDEMPOTENCY_KEY: Final = "Idempotency-Key"
RUN_ID: Final = "X-Run-Id"
SAMPLER_ID: Final = "X-Sampler-Id"
MIN_POLICY_VERSION: Final = "X-Min-Policy-Version"
CHECKPOINT_PATH: Final = "X-Checkpoint-Path"
CHECKPOINT_ID: Final = "X-Checkpoint-Id"
"""Of the embedded service alone: which of the checkpoints that have had this path."""
AFFINITY: Final = "X-Baseten-Session-ID"
ACCEPT_ERROR: Final = "X-Baseten-Accept-Error"
ERROR_SOURCE: Final = "X-Baseten-Error-Source"
ERROR_CODE: Final = "X-Baseten-Error-Code"
POLICY_VERSION: Final = "x-trainers-policy-version"

# --- numbers ---------------------------------------------------------------------------------------------------------

POLL_HOLD_SECONDS: Final = 30.0
"""The seconds for which the service holds a poll of an operation before it answers 408."""

INT64: Final = range(-(1 << 63), 1 << 63)
"""The integers of tensors, and so the token ids."""

MAX_REQUEST_BYTES: Final = 24 * 1024 * 1024
"""The largest body of one training request."""

MAX_TOP_K_LOGPROBS: Final = 20
"""The most candidate tokens for one position of an example or of a prompt."""

MAX_METRIC_STEPS: Final = 1024
"""The most steps whose metrics one request carries."""

SCHEMA_VERSION: Final = 1

LOCAL_ID: Final = "local"
"""The id of the session and of the sampler of a client without a control plane."""

# --- statuses --------------------------------------------------------------------------------------------------------

NO_SUCH_ROUTE: Final = (404, 405, 501)
"""How a service answers that does not have a route, e.g. an older one."""

SAMPLER_READY: Final = "ACTIVE"
SCALED_TO_ZERO: Final = "SCALED_TO_ZERO"
SAMPLER_TERMINAL: Final = frozenset(
    {"DEPLOY_FAILED", "UNHEALTHY", "BUILD_FAILED", "BUILD_STOPPED", "DEACTIVATING", "INACTIVE", "FAILED"}
)
TRAINER_TERMINAL: Final = frozenset({"FAILED", "STOPPED", "PREEMPTED"})

# --- operations of a trainer -----------------------------------------------------------------------------------------


class InitTrainerServerBody(Struct, kw_only=True):
    """``POST /init_trainer_server``: start from a new adapter of this rank."""

    lora_rank: Annotated[int, Meta(ge=1)]
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
    """``POST /save_weights_for_sampler``: True `bump_version` publishes to the paired sampler, False only stages."""

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


class OwnMetrics(Struct, kw_only=True):
    """Metrics of the caller's own that belong to one step."""

    step: Annotated[int, Meta(ge=1, lt=2**53)]
    metrics: dict[str, float]


class OwnMetricsBody(Struct, kw_only=True):
    """``POST /metrics`` of a trainer; an extension of services whose capabilities say ``metrics: true``."""

    steps: Annotated[list[OwnMetrics], Meta(max_length=MAX_METRIC_STEPS)]


class Accepted(Struct, kw_only=True):
    """Body of the 202 answer that accepts an operation."""

    operation_id: GivenId
    schema_version: int = SCHEMA_VERSION


class PolicyVersion(Struct, kw_only=True):
    """Body of ``GET /policy_version`` and ``GET /trainers_policy_version``."""

    policy_version: int | None = None


# --- losses ----------------------------------------------------------------------------------------------------------

TARGET_TOKENS: Final = "target_tokens"
WEIGHTS: Final = "weights"
ADVANTAGES: Final = "advantages"
MASK: Final = "mask"
"""Read by the drift metrics alone, and not sent."""
LOGPROBS: Final = frozenset({"logprobs", "ref_logprobs"})
"""The inputs that are logprobs in nats."""
SKIP_NORMALIZATION: Final = "skip_token_normalization"
SCORE_ALL: Final = "score_all_targets"
"""Logprobs are real also where an advantage is zero; an extension of the embedded service."""

IGNORED_TARGET: Final = -100
"""The target token of a position that is not scored."""


class Setting(Struct, frozen=True):
    """A setting of a loss: a bool if its default is one, else a finite number from `at_least` to `at_most`."""

    default: float | bool
    at_least: float = 0.0
    at_most: float = sys.float_info.max

    def checked(self, value: Any, path: str) -> float | bool:
        """Return `value` if the setting allows it; errors name the argument `path`."""
        value = plain_number(value)
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise InputError(path, f"must be true or false; got {value!r}")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.at_least <= value <= self.at_most:
            raise InputError(path, f"must be {self._range()}; got {value!r}")
        return float(value)

    def _range(self) -> str:
        if self.at_most == sys.float_info.max:
            return f"a finite number of at least {self.at_least:g}"
        return f"a number from {self.at_least:g} to {self.at_most:g}"


class LossRule(Struct, frozen=True, kw_only=True):
    """The ``loss_fn_inputs`` that a loss reads from each datum, and the settings of its ``loss_fn_config``."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    settings: Mapping[str, Setting] = {}
    group: int = 1
    """The number of consecutive datums that belong together: 2 for the (chosen, rejected) pairs of dpo."""
    target_rank: int = 1
    """The largest rank of the targets: 1 for the shape (N,), 2 for (N,) and (N, K)."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """All inputs that the loss reads, required and optional."""
        return self.required + self.optional

    @property
    def excluding(self) -> str:
        """The input whose zeros exclude positions."""
        return ADVANTAGES if ADVANTAGES in self.inputs else WEIGHTS

    def counted(self, datum: Datum) -> list[bool]:
        """Whether each position of a datum counts; its inputs have passed `checked_loss_data`."""
        positions, counts = datum.model_input.length, self._counted_factors(datum)
        width = len(counts) // positions
        return counts if width == 1 else [any(counts[at : at + width]) for at in range(0, len(counts), width)]

    def counted_targets(self, datum: Datum) -> list[bool]:
        """Whether each target of a datum adds to the loss; without targets, the last position has none."""
        counts = self._counted_factors(datum)
        if TARGET_TOKENS not in datum.loss_fn_inputs:
            counts[-1] = False
        return counts

    def _counted_factors(self, datum: Datum) -> list[bool]:
        positions = datum.model_input.length
        targets, factors = datum.loss_fn_inputs.get(TARGET_TOKENS), datum.loss_fn_inputs.get(self.excluding)
        counts = [True] * positions if targets is None else [target != IGNORED_TARGET for target in targets.data]
        if factors is not None:
            repeated = factors.data * (len(counts) // len(factors.data))  # one advantage may hold for all positions
            counts = [scored and factor != 0 for scored, factor in zip(counts, repeated, strict=True)]
        return counts

    def trained(self, datum: Datum) -> int:
        """Return the number of positions whose weight or advantage is not 0; see `counted`."""
        positions = datum.model_input.length
        targets, factors = datum.loss_fn_inputs.get(TARGET_TOKENS), datum.loss_fn_inputs.get(self.excluding)
        if targets is not None and len(targets.numbers) != positions:  # several targets for each position
            return sum(self.counted(datum))
        if factors is None:
            return positions if targets is None else positions - int(targets.numbers.count(IGNORED_TARGET))
        if len(factors.numbers) == 1:
            return positions if factors.numbers[0] else 0
        return positions - int(factors.numbers.count(0))


# The reference lists skip_token_normalization for cross_entropy only. Every loss has it here, since "More facts" there
# says that all losses are sums, which `optim_step` divides by the number of tokens unless this is set.
_EVERY: Final = {SKIP_NORMALIZATION: Setting(default=False), SCORE_ALL: Setting(default=False)}
_CLIP: Final = {"clip_low_threshold": Setting(0.8), "clip_high_threshold": Setting(1.2)}  # ratios, not distances from 1
_DPPO: Final = {
    "dppo_mask_high": Setting(0.2),
    "dppo_mask_low": Setting(0.2),
    "adv_tau": Setting(1.0),
    "kl_tau": Setting(1e-3),
}
_DPO: Final = {"beta": Setting(0.1), "label_smoothing": Setting(0.0, at_most=1.0)}


def _policy_loss(settings: Mapping[str, Setting]) -> LossRule:
    return LossRule(required=("logprobs", ADVANTAGES), optional=(TARGET_TOKENS,), settings={**settings, **_EVERY})


LOSSES: Final[Mapping[str, LossRule]] = {
    "cross_entropy": LossRule(optional=(TARGET_TOKENS, WEIGHTS), settings=_EVERY, target_rank=2),
    "importance_sampling": _policy_loss({}),
    "ppo": _policy_loss(_CLIP),
    "dppo": _policy_loss(_DPPO),
    "cispo": _policy_loss(_CLIP),
    "dro": _policy_loss({"beta": Setting(0.05)}),
    # The reference lists three inputs and does not say whether any is optional. Weights are optional, as for
    # cross_entropy: the embedded trainer and `attach_reference_logprobs` both accept pairs without them. Targets are
    # required.
    "dpo": LossRule(
        required=(TARGET_TOKENS, "ref_logprobs"), optional=(WEIGHTS,), settings={**_DPO, **_EVERY}, group=2
    ),
}
"""All built-in losses (data-plane reference 2.4).

Without ``target_tokens``, the targets are the input shifted by one; without ``weights``, every target has weight 1
unless it is `IGNORED_TARGET`.
"""


def loss_rule(loss_fn: Any) -> LossRule:
    """Return the rule of the loss named `loss_fn`, or raise an `InputError`."""
    if not isinstance(loss_fn, str) or loss_fn not in LOSSES:
        raise InputError("loss_fn", f"must be one of {', '.join(LOSSES)}; got {loss_fn!r}")
    return LOSSES[loss_fn]


def loss_settings(loss_fn: str, config: Mapping[Any, Any]) -> dict[str, float | bool]:
    """Check a ``loss_fn_config``; return all settings of the loss, with defaults for the missing ones."""
    known = loss_rule(loss_fn).settings
    values = {name: setting.default for name, setting in known.items()}
    for name, value in config.items():
        path = f"loss_fn_config[{name!r}]"
        if name not in known:
            raise InputError(path, f"unknown setting; {loss_fn} has {', '.join(known)}")
        values[name] = known[name].checked(value, path)
    low, high = (values.get(name, setting.default) for name, setting in _CLIP.items())
    if low > high:
        path = "loss_fn_config['clip_low_threshold']"
        raise InputError(path, f"must not exceed clip_high_threshold; got {low}, {high}")
    return values


def checked_loss_data(loss_fn: str, data: Iterable[Datum], count: int) -> Iterator[Datum]:
    """Yield `count` examples, each when it is checked: that its inputs are there, in shapes that the loss accepts."""
    rule = loss_rule(loss_fn)
    if count % rule.group:
        raise InputError("data", f"{loss_fn} needs (chosen, rejected) pairs, so an even number of datums; got {count}")
    first: list[int] = []
    for index, datum in enumerate(data):
        path = f"data[{index}].loss_fn_inputs"
        if missing := [name for name in rule.required if name not in datum.loss_fn_inputs]:
            raise InputError(path, f"{loss_fn} needs {', '.join(rule.required)}; missing {missing}")
        shape = _target_shape(loss_fn, datum, f"{path}[{TARGET_TOKENS!r}]")
        first = first or shape
        if shape[1:] != first[1:]:
            problem = f"every datum needs targets of the same rank and K; shapes are {first}, {shape}"
            raise InputError(f"{path}[{TARGET_TOKENS!r}]", problem)
        for name in rule.inputs:
            own = datum.loss_fn_inputs.get(name)
            if own is not None and own.shape != shape and not is_for_all_positions(name, own):
                raise InputError(f"{path}[{name!r}]", f"must have the shape of the targets, {shape}; got {own.shape}")
        yield datum


def _target_shape(loss_fn: str, datum: Datum, path: str) -> list[int]:
    positions = datum.model_input.length
    targets = datum.loss_fn_inputs.get(TARGET_TOKENS)
    if targets is None:
        return [positions]
    if not targets.dtype.startswith("int"):
        raise InputError(path, f"must be integers; got dtype {targets.dtype}")
    shape, most = targets.shape, LOSSES[loss_fn].target_rank
    if shape[:1] != [positions] or len(shape) > most or 0 in shape:
        wanted = " or ".join((f"[{positions}]", f"[{positions}, K]")[:most])
        rule = f"must have the shape {wanted} for {loss_fn}, as model_input has {positions} positions"
        raise InputError(path, f"{rule}; got {shape}")
    return shape


def is_for_all_positions(name: str, tensor: TensorData) -> bool:
    """Whether an input is one number for all positions, which only advantages may be."""
    return name == ADVANTAGES and tensor.shape == [1]


# --- sampling --------------------------------------------------------------------------------------------------------


class SampleBody(Struct, kw_only=True, gc=False):
    """``POST /sample``, similar to OpenAI completions.

    ``logprobs: 0`` requests the logprob of the chosen token only; ``prompt_logprobs: K`` those of the prompt, with the
    K most likely tokens.
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

    @property
    def length(self) -> int:
        """Positions of the prompt, with those of its images."""
        chunks = self.model_input_chunks
        return len(self.prompt) if chunks is UNSET else ModelInput(chunks).length

    @property
    def checkpoint_path(self) -> str | None:
        """The checkpoint to sample from, as far as the body says so."""
        return None if self.lora is UNSET else self.lora


class PromptLogprob(Struct):
    """One candidate token at one position of the prompt."""

    logprob: float | None = None
    rank: int | None = None
    decoded_token: str | None = None


PromptLogprobs: TypeAlias = list[dict[str, PromptLogprob] | None]


class ChoiceLogprobs(Struct):
    """Tokens of a completion (``"token_id:<int>"`` or ints) and their logprobs."""

    tokens: list[str | int] = []
    token_logprobs: list[float | None] = []


class ChoiceBase(Struct, kw_only=True):
    """The fields that all completions have."""

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
    """An entry of ``GET /v1/models``; an adapter has a `parent`, the base model does not.

    `tokenizer` is an extension of the embedded service: the path of the tokenizer's files, relative to the sampler's
    root.
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
    """``bt://loops:<run_id>/(weights|sampler_weights)/<name>``; ``weights`` to train, ``sampler_weights`` to serve.

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
        """Parse a URI; `kind` is the required kind, if any, and `path` the argument's name in errors."""
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
    """Return `name` if it is a valid checkpoint name; it becomes a path segment and a directory."""
    fits = isinstance(name, str) and 1 <= len(name) <= 255 and name not in (".", "..")
    if not fits or any(c in "/\\" or not c.isprintable() for c in name):
        raise InputError(path, f"{_NAME_RULE}; got {name!r}")
    return name


def segment(value: str) -> str:
    """Escape an id for use as one segment of a URL path."""
    return quote(value, safe="")


# `msgspec` resolves annotations lazily; resolving them here turns a mistake into an import error.
for _body in (ForwardBody, SampleBody, Completions):
    msgspec.json.Decoder(_body)
