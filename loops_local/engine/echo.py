"""The `echo` engine: an engine without a model, for tests of the protocol and benchmarks.

It learns nothing. A completion repeats the prompt, starting one token later for each further sample; logprobs are a
fixed function of the token, the one before it and the adapter's step, the same in training and in sampling, so
that a caller can see which version answered. Any token id from 0 on is accepted.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from loops_async.protocol import IGNORED_TARGET, INT64, LOSSES, SKIP_NORMALIZATION, TARGET_TOKENS
from loops_async.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput, TensorData

from . import byte_tokenizer
from .base import Completion, ModelInfo, RefusedError, SampleJob, SampleOutcome, SamplerUsage
from .checks import check_normalization

__all__ = ["EchoEngine", "logprob"]

STATE_FILE = "trainer_state.json"
GRADIENTS_FILE = "gradients.json"
MAX_SEQ_LEN = 32768
CONFIG_FILE = "adapter_config.json"
_TOKEN_IDS = range(INT64.stop)


def logprob(previous: int, token: int, step: int) -> float:
    """Return the logprob in nats, between -2 and 0, of `token` after `previous` at optimizer step `step`."""
    return -(1 + (31 * previous + 17 * token + 7 * step) % 997) / 500


class EchoAdapter(Struct, frozen=True, weakref=True):
    """Takes the place of LoRA weights: the rank, and the step at which it was copied."""

    rank: int
    step: int

    @property
    def nbytes(self) -> int:
        """The size of the matrices that `save` writes."""
        return 2 * 4 * self.rank

    def save(self, directory: Path) -> None:
        """Write files in PEFT's format, with one 1 x `rank` matrix pair of the step's number."""
        config = {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.rank, "target_modules": ["echo"]}
        (directory / CONFIG_FILE).write_bytes(msgspec.json.encode(config))
        names = ("base_model.model.echo.lora_A.weight", "base_model.model.echo.lora_B.weight")
        shapes = ((self.rank, 1), (1, self.rank))
        tensors = {name: (shape, [float(self.step)] * self.rank) for name, shape in zip(names, shapes, strict=True)}
        (directory / "adapter_model.safetensors").write_bytes(_safetensors(tensors))


class _Pending(Struct, frozen=True):
    """What takes the place of gradients: the datums and the backward passes since the last step.

    `skip` says whether these skip normalisation; None if there were none.
    """

    datums: int = 0
    passes: int = 0
    skip: bool | None = None


class EchoTrainer:
    """Counts steps and keeps a rank."""

    _pending: _Pending

    def __init__(self, rank: int) -> None:
        self.rank: int = rank
        self.step: int = 0
        self._pending = _Pending()

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        config: Mapping[str, Any],
        *,
        backward: bool,
        top_k: int = 0,
    ) -> ForwardBackwardOutput:
        """Score targets by `logprob`; the loss is minus their weighted mean, for every `loss_fn`."""
        if top_k:
            raise RefusedError("the echo engine has no top_k_logprobs; use the torch engine")
        excluding = LOSSES[loss_fn].excluding
        scored = [_score(datum, excluding, f"data[{index}]", self.step) for index, datum in enumerate(data)]
        skip = bool(config.get(SKIP_NORMALIZATION))
        if backward:
            check_normalization(self._pending.skip, skip)
        total = sum(one.weight for one in scored)
        loss = sum(one.loss for one in scored) / total if total else 0.0
        tokens = float(sum(one.tokens for one in scored))
        metrics = {"loss": loss, "tokens": tokens, "tokens:sum": tokens}
        if skip:
            metrics[SKIP_NORMALIZATION] = 1.0
        if backward:
            self._pending = _Pending(self._pending.datums + len(data), self._pending.passes + 1, skip)
        outputs = [{"logprobs": one.logprobs} for one in scored]
        return ForwardBackwardOutput(loss=loss, loss_fn_output_type="echo", loss_fn_outputs=outputs, metrics=metrics)

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        """Count a step; ``grad_norm`` is the number of datums since the last one."""
        self.step += 1
        pending, self._pending = self._pending, _Pending()
        rate = params.learning_rate
        return {
            "step": float(self.step),
            "learning_rate": rate,
            "lr": rate,
            "grad_norm": float(pending.datums),
            "backward_passes": float(pending.passes),
        }

    def adapter(self) -> EchoAdapter:
        """Return the rank and step as they are now."""
        return EchoAdapter(self.rank, self.step)

    def save(self, directory: Path) -> None:
        """Write the adapter's files and the step."""
        self.adapter().save(directory)
        (directory / STATE_FILE).write_bytes(msgspec.json.encode({"step": self.step}))

    def save_gradients(self, directory: Path) -> None:
        """Write what was counted since the last step."""
        (directory / GRADIENTS_FILE).write_bytes(msgspec.json.encode(self._pending))

    def load_gradients(self, directory: Path) -> None:
        """Read these counts; snapshots of older versions have none."""
        if (directory / GRADIENTS_FILE).is_file():
            self._pending = msgspec.json.decode((directory / GRADIENTS_FILE).read_bytes(), type=_Pending)

    def load(self, directory: Path, *, optimizer: bool) -> None:
        """Read the rank, and with `optimizer` the step."""
        if optimizer and not (directory / STATE_FILE).is_file():
            raise RefusedError("this checkpoint holds no optimizer state; load it with load_state")
        self.rank, self.step, self._pending = _rank_of(directory), 0, _Pending()
        if optimizer:
            self.step = msgspec.json.decode((directory / STATE_FILE).read_bytes())["step"]


class EchoSampler:
    """Generates at once, in the calling thread."""

    def submit(self, job: SampleJob) -> Future[SampleOutcome]:
        """Return the finished samples of `job`."""
        prompt = _tokens_of(job.prompt, "prompt")
        if not prompt:
            raise RefusedError("prompt: must have at least one token")
        if job.params.structured_outputs is not None:
            raise RefusedError("the echo engine has no structured outputs")
        step = job.adapter.step if isinstance(job.adapter, EchoAdapter) else 0
        completions = [_complete(prompt, index, job, step) for index in range(job.num_samples)]
        scores = None if job.prompt_logprobs is None else _prompt_logprobs(prompt, step, job.prompt_logprobs)
        outcome: Future[SampleOutcome] = Future()
        outcome.set_result(SampleOutcome(completions=completions, prompt_logprobs=scores))
        return outcome

    @property
    def usage(self) -> SamplerUsage:
        """Return zeros: it holds nothing."""
        return SamplerUsage()

    def close(self) -> None:
        """Do nothing: there is no thread."""


class EchoEngine:
    """The engine; it accepts any `name`."""

    def __init__(self, name: str) -> None:
        self.model: ModelInfo = ModelInfo(
            name=name, arch="echo", max_seq_len=MAX_SEQ_LEN, vocab_size=byte_tokenizer.VOCAB_SIZE
        )

    def trainer(self, rank: int, seed: int | None = None) -> EchoTrainer:
        """Return a trainer; nothing is random, so `seed` has no effect."""
        return EchoTrainer(rank)

    def sampler(self) -> EchoSampler:
        """Return a sampler."""
        return EchoSampler()

    def load_adapter(self, directory: Path) -> EchoAdapter:
        """Read what `EchoAdapter.save` wrote; the weights hold the step."""
        rank = _rank_of(directory)
        weights = (directory / "adapter_model.safetensors").read_bytes()
        return EchoAdapter(rank, int(struct.unpack("<f", weights[-4:])[0]))

    def write_tokenizer(self, directory: Path) -> None:
        """Write the byte tokenizer."""
        byte_tokenizer.write(directory)


def _tokens_of(text: ModelInput, path: str) -> list[int]:
    if text.has_images:
        raise RefusedError(f"{path}: the echo engine has no images")
    tokens = text.to_ints()
    if odd := [token for token in (min(tokens, default=0), max(tokens, default=0)) if token not in _TOKEN_IDS]:
        raise RefusedError(f"{path}: token ids must be 0 or more, and fit int64; got {odd[0]}")
    return tokens


class _Scored(NamedTuple):
    """Logprobs, summed loss, summed weight and the number of weighted positions of one datum."""

    logprobs: TensorData
    loss: float
    weight: float
    tokens: int


def _score(datum: Datum, excluding: str, where: str, step: int) -> _Scored:
    tokens = _tokens_of(datum.model_input, f"{where}.model_input")
    inputs = datum.loss_fn_inputs
    if TARGET_TOKENS not in inputs:
        scores = [logprob(a, b, step) for a, b in pairwise(tokens)]
        logprobs = TensorData(data=[*scores, 0.0], dtype="float32", shape=[len(tokens)])
        return _Scored(logprobs, -sum(scores), len(scores), len(scores))
    targets = inputs[TARGET_TOKENS]
    per_position = len(targets.data) // len(tokens)
    ids = _targets_of(targets, f"{where}.loss_fn_inputs[{TARGET_TOKENS!r}]")
    scores = [
        math.nan if target == IGNORED_TARGET else logprob(tokens[k // per_position], target, step)
        for k, target in enumerate(ids)
    ]
    weights = _weights(inputs.get(excluding), len(ids))
    weighted = [(weight, score) for weight, score in zip(weights, scores, strict=True) if weight and score == score]
    loss = -sum(weight * score for weight, score in weighted)
    logprobs = TensorData(data=list(scores), dtype="float32", shape=targets.shape)
    return _Scored(logprobs, loss, sum(w for w, _ in weighted), len(weighted))


def _targets_of(targets: TensorData, path: str) -> list[int]:
    ids = [int(target or 0) for target in targets.data]
    if odd := [target for target in ids if target < 0 and target != IGNORED_TARGET]:
        raise RefusedError(f"{path}: {odd[0]} is neither {IGNORED_TARGET} nor a token id, which is 0 or more")
    return ids


def _weights(factors: TensorData | None, count: int) -> list[float]:
    if factors is None:
        return [1.0] * count
    values = [float(factor or 0.0) for factor in factors.data]
    return values * (count // len(values))  # one advantage may hold for all positions


def _complete(prompt: list[int], index: int, job: SampleJob, step: int) -> Completion:
    params = job.params
    limit = params.max_tokens or len(prompt)
    tokens, text, finish = _until_stop(_echo(prompt, index, limit), params.stop)
    if finish is None:
        finish = "length" if params.max_tokens else "stop"
    scores = [logprob(a, b, step) for a, b in pairwise([prompt[-1], *tokens])]
    return Completion(tokens=tokens, logprobs=scores, text=text, finish_reason=finish)


def _echo(prompt: list[int], index: int, limit: int) -> list[int]:
    start = index % len(prompt)
    rotated = prompt[start:] + prompt[:start]
    repeated = rotated * -(-limit // len(prompt))
    return repeated[:limit]


def _until_stop(tokens: list[int], stop: str | list[str | int] | None) -> tuple[list[int], str, str | None]:
    """Cut after the first stop token or string; as in vLLM, it is part of the tokens but not of the text."""
    stops = [stop] if isinstance(stop, str) else stop or []
    stop_ids = {word for word in stops if isinstance(word, int)}
    words = [word for word in stops if isinstance(word, str)]
    if not stops:
        return tokens, _text(tokens), None
    for end, token in enumerate(tokens, start=1):
        if token in stop_ids:
            return tokens[:end], _text(tokens[: end - 1]), "stop"
        text = _text(tokens[:end]) if words else ""
        cuts = [text.index(word) for word in words if word in text]
        if cuts:
            return tokens[:end], text[: min(cuts)], "stop"
    return tokens, _text(tokens), None


def _text(tokens: Iterable[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")


def _prompt_logprobs(prompt: list[int], step: int, best: int) -> list[dict[int, float] | None]:
    scores: list[dict[int, float] | None] = [None]
    for previous, token in pairwise(prompt):
        own = {token: logprob(previous, token, step)}
        scores.append(own | _best(previous, step, best) if best else own)
    return scores


def _best(previous: int, step: int, count: int) -> dict[int, float]:
    every = {token: logprob(previous, token, step) for token in range(byte_tokenizer.VOCAB_SIZE)}
    ordered = sorted(every.items(), key=lambda item: -item[1])
    return dict(islice(ordered, count))


def _rank_of(directory: Path) -> int:
    try:
        return int(msgspec.json.decode((directory / CONFIG_FILE).read_bytes())["r"])
    except (OSError, KeyError, msgspec.DecodeError) as broken:
        raise RefusedError(f"no adapter can be read from {directory.name!r}: {broken}") from broken


def _safetensors(tensors: Mapping[str, tuple[tuple[int, int], list[float]]]) -> bytes:
    """Encode float32 matrices. Source: the safetensors format, an 8-byte length, a JSON header, the data."""
    header: dict[str, Any] = {}
    data = b""
    for name, (shape, values) in tensors.items():
        start = len(data)
        data += struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, len(data)]}
    encoded = msgspec.json.encode(header)
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + data
