"""Trains one run's adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from loops_async.protocol import SKIP_NORMALIZATION
from loops_async.types import AdamParams, Datum, ForwardBackwardOutput, TensorData

from ..base import RefusedError
from ..checks import check_normalization
from . import cores, passes
from .adapter import LoraAdapter, named, unnamed
from .examples import Example, examples
from .lora import ALPHA, fresh
from .losses import find
from .models import Base
from .optimizer import Adam
from .passes import Pass, Score

__all__ = ["LoraTrainer"]

_OPTIMIZER = "optimizer.safetensors"
_STATE = "trainer_state.json"
_GRADIENTS = "gradients.safetensors"
_PENDING = "gradients.json"
_MOMENTS = ("mean", "square")


class _State(msgspec.Struct, kw_only=True):
    """`trainer_state.json`: the number of optimizer steps behind the weights."""

    step: int


class _Pending(msgspec.Struct, kw_only=True):
    """`gradients.json`: the tokens and passes in the gradients; `skip` is None if no pass followed the last step."""

    tokens: int
    skip: bool | None
    passes: int = 0


class LoraTrainer:
    """An adapter, its gradients and its optimizer. Gradients are sums; an optimizer step normalises them."""

    _adapter: LoraAdapter
    _optimizer: Adam
    _gradient: Tensor
    _tokens: int
    _passes: int
    _skip: bool | None

    def __init__(self, base: Base, rank: int, seed: int | None) -> None:
        if rank < 1:
            raise RefusedError(f"lora_rank: must be at least 1; got {rank}")
        self._base = base
        flat = fresh(base.shapes, rank, seed)
        self._start(LoraAdapter(flat, rank, ALPHA, base.info.name, base.shapes), Adam(flat.numel()))

    @property
    def step(self) -> int:
        return self._optimizer.step

    @property
    def rank(self) -> int:
        return self._adapter.rank

    def forward(
        self, data: Sequence[Datum], loss_fn: str, config: Mapping[str, Any], *, backward: bool, top_k: int = 0
    ) -> ForwardBackwardOutput:
        """Compute the loss and logprobs; with `backward`, add to the gradients.

        Each output has ``logprobs`` with the shape of the datum's targets: NaN where the target is ignored, 0.0 where
        an advantage is zero (unless ``score_all_targets`` is set), else the logprob of the target. With `top_k` it also
        has ``topk_token_ids`` (int64) and ``topk_logprobs`` (float32), both of shape (N, top_k), best first; -1 and NaN
        where nothing is scored. These two names are ours: the published protocol leaves them open.

        The metrics are ``loss``, a mean over the targets with weight (`dpo`: over pairs), ``loss:sum``, the same as a
        sum, ``tokens``, the number of positions with weight, and ``tokens:sum``, the same. A client that splits a batch
        adds up the sums of its parts, and returns the means of all other metrics.

        A call that is refused leaves the gradients as they were.
        """
        loss = find(loss_fn, config)
        given = examples(data, loss, self._base.info)
        skip = loss.skips_normalization
        if backward:
            check_normalization(self._skip, skip)
        with cores.working():
            result = passes.run(self._base, self._adapter, given, loss, backward=backward, top_k=top_k)
        if backward:
            self._add(result, skip)
        return _output(given, result, skip)

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        """Normalise by the number of tokens, clip, apply Adam, reset the gradients, and return metrics.

        ``grad_norm`` is the L2 norm after normalisation and before clipping. ``backward_passes`` is the number of calls
        of `forward` whose gradients are applied; with 0, only Adam's momentum and weight decay change the weights.
        """
        params = _valid(params)
        gradient = self._gradient if self._skip else self._gradient / max(1, self._tokens)
        norm = float(torch.linalg.vector_norm(gradient))
        pending = {"tokens": float(self._tokens), "backward_passes": float(self._passes)}
        self._reset_gradient()
        if not math.isfinite(norm):
            raise RefusedError("the gradient is not finite; it was dropped and the weights are as before")
        if 0 < params.grad_clip_norm < norm:
            gradient = gradient * (params.grad_clip_norm / norm)
        with cores.working():
            flat = self._optimizer.update(self._adapter.flat, gradient, params)
        self._adapter = replace(self._adapter, flat=flat)
        rate = params.learning_rate
        return {"step": float(self.step), "learning_rate": rate, "lr": rate, "grad_norm": norm, **pending}

    def adapter(self) -> LoraAdapter:
        """Return the weights of this step; they are immutable, since an optimizer step creates new ones."""
        return self._adapter

    def save(self, directory: Path) -> None:
        """Write the adapter in PEFT's format, the optimizer's state and the step, all bit-exact."""
        self._adapter.save(directory)
        tensors = {
            f"{moment}.{name}": part
            for moment in _MOMENTS
            for name, part in named(getattr(self._optimizer, moment), self._base.shapes, self.rank).items()
        }
        save_file(tensors, directory / _OPTIMIZER)
        (directory / _STATE).write_bytes(msgspec.json.encode(_State(step=self.step)))

    def save_gradients(self, directory: Path) -> None:
        """Write the gradients that no optimizer step has applied yet, bit-exact."""
        save_file(named(self._gradient, self._base.shapes, self.rank), directory / _GRADIENTS)
        pending = _Pending(tokens=self._tokens, skip=self._skip, passes=self._passes)
        (directory / _PENDING).write_bytes(msgspec.json.encode(pending))

    def load_gradients(self, directory: Path) -> None:
        """Read what `save_gradients` wrote; snapshots of older versions have no gradients."""
        if not (directory / _PENDING).is_file():
            return
        pending = msgspec.json.decode((directory / _PENDING).read_bytes(), type=_Pending)
        self._gradient = unnamed(load_file(directory / _GRADIENTS), self._base.shapes, self.rank)
        self._tokens, self._skip, self._passes = pending.tokens, pending.skip, pending.passes

    def load(self, directory: Path, *, optimizer: bool) -> None:
        """Read weights and their rank; with `optimizer` also moments and step, otherwise start with a new optimizer.

        A load that is refused leaves the trainer as it was.
        """
        adapter = LoraAdapter.read(directory, model=self._base.info.name, shapes=self._base.shapes)
        adam = self._read_optimizer(directory, adapter) if optimizer else Adam(adapter.flat.numel())
        self._start(adapter, adam)

    def _start(self, adapter: LoraAdapter, optimizer: Adam) -> None:
        self._adapter = adapter
        self._optimizer = optimizer
        self._reset_gradient()

    def _reset_gradient(self) -> None:
        self._gradient = torch.zeros_like(self._adapter.flat)
        self._tokens = self._passes = 0
        self._skip = None

    def _add(self, result: Pass, skip: bool) -> None:
        if result.gradient is not None:
            self._gradient += result.gradient
        self._tokens += result.tokens
        self._passes += 1
        self._skip = skip

    def _read_optimizer(self, directory: Path, adapter: LoraAdapter) -> Adam:
        try:
            tensors = load_file(directory / _OPTIMIZER)
            state = msgspec.json.decode((directory / _STATE).read_bytes(), type=_State)
        except (OSError, SafetensorError, msgspec.DecodeError) as error:
            raise RefusedError(f"{directory} has no optimizer state that can be loaded: {error}") from error
        adam = Adam(0)
        adam.mean, adam.square = (self._moment(tensors, moment, adapter.rank) for moment in _MOMENTS)
        adam.step = state.step
        return adam

    def _moment(self, tensors: Mapping[str, np.ndarray[Any, Any]], moment: str, rank: int) -> Tensor:
        prefix = f"{moment}."
        own = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
        return unnamed(own, self._base.shapes, rank)


def _valid(params: AdamParams) -> AdamParams:
    try:
        return msgspec.convert(msgspec.structs.asdict(params), AdamParams)
    except msgspec.ValidationError as error:
        raise RefusedError(f"adam_params: {error}") from error


def _output(given: Sequence[Example], result: Pass, skip: bool) -> ForwardBackwardOutput:
    loss = result.loss / max(1, result.terms)
    metrics = {
        "loss": loss,
        "loss:sum": result.loss,
        "tokens": float(result.tokens),
        "tokens:sum": float(result.tokens),
    }
    if skip:
        metrics[SKIP_NORMALIZATION] = 1.0
    return ForwardBackwardOutput(
        loss=loss,
        loss_fn_output_type="logprobs",
        loss_fn_outputs=[_scores(example, score) for example, score in zip(given, result.scores, strict=True)],
        metrics=metrics,
    )


def _scores(example: Example, score: Score) -> dict[str, TensorData]:
    tensors = {"logprobs": TensorData.of(score.logprobs.reshape(example.shape))}
    if score.top_ids.shape[1]:
        tensors["topk_token_ids"] = TensorData.of(score.top_ids)
        tensors["topk_logprobs"] = TensorData.of(score.top_logprobs)
    return tensors
