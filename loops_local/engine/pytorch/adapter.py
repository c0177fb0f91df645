"""The LoRA weights of one version, and their files in PEFT's format.

`adapter_config.json` and `adapter_model.safetensors` are what `peft.PeftModel.from_pretrained` reads, and vLLM too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from msgspec import Meta, Struct
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from ..base import RefusedError
from .lora import Pair, Shapes, pairs, size

__all__ = ["LoraAdapter", "named", "unnamed"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


class _Config(Struct, kw_only=True):
    """The fields of `adapter_config.json` that matter. The last five change what the weights mean and must be off."""

    base_model_name_or_path: str
    r: Annotated[int, Meta(ge=1)]
    lora_alpha: int | float
    target_modules: list[str] | str
    peft_type: Literal["LORA"] = "LORA"
    task_type: str | None = "CAUSAL_LM"
    bias: str = "none"
    fan_in_fan_out: bool = False
    inference_mode: bool = True
    lora_dropout: float = 0.0

    use_dora: bool = False
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, Any] | None = {}
    alpha_pattern: dict[str, Any] | None = {}

    def special(self) -> list[str]:
        off = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")
        return [name for name in off if getattr(self, name)]


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """Immutable LoRA weights: `flat` is never changed. `model` is the base model's name."""

    flat: Tensor
    rank: int
    alpha: int | float
    model: str
    shapes: Shapes

    @cached_property
    def weights(self) -> dict[str, Pair]:
        return pairs(self.flat, self.shapes, self.rank)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes

    def save(self, directory: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` in PEFT's format."""
        directory.mkdir(parents=True, exist_ok=True)
        config = _Config(
            base_model_name_or_path=self.model,
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=sorted({name.rpartition(".")[2] for name in self.shapes}),
        )
        (directory / _CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2))
        save_file(named(self.flat, self.shapes, self.rank), directory / _WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def read(cls, directory: Path, *, model: str, shapes: Shapes) -> LoraAdapter:
        """Read what `save` or PEFT wrote for this base model."""
        config = _read_config(directory / _CONFIG, model)
        try:
            tensors = load_file(directory / _WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise RefusedError(f"cannot read the adapter's weights in {directory / _WEIGHTS}: {error}") from error
        return cls(unnamed(tensors, shapes, config.r), config.r, config.lora_alpha, model, shapes)


def named(flat: Tensor, shapes: Shapes, rank: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return the parts of a flat vector by their names in PEFT."""
    return {
        f"base_model.model.{name}.lora_{letter}.weight": part.detach().numpy()
        for name, pair in pairs(flat, shapes, rank).items()
        for letter, part in zip("AB", pair, strict=True)
    }


def unnamed(tensors: Mapping[str, np.ndarray[Any, Any]], shapes: Shapes, rank: int) -> Tensor:
    """Return one flat vector of the parts with their names in PEFT; there must be neither fewer nor more parts."""
    flat = torch.empty(size(shapes, rank))
    views = named(flat, shapes, rank)
    if odd := sorted(views.keys() ^ tensors.keys()):
        raise RefusedError(f"the adapter does not have the layers of the base model; {odd[0]!r} is in only one of them")
    for name, view in views.items():
        if tensors[name].shape != view.shape:
            raise RefusedError(f"{name} has shape {tensors[name].shape}; the base model needs {view.shape}")
        view[:] = tensors[name]
    return flat


def _read_config(path: Path, model: str) -> _Config:
    try:
        config = msgspec.json.decode(path.read_bytes(), type=_Config)
    except (OSError, msgspec.DecodeError) as error:
        raise RefusedError(f"cannot read the adapter's settings in {path}: {error}") from error
    if config.base_model_name_or_path != model:
        raise RefusedError(
            f"the adapter was trained on {config.base_model_name_or_path!r}, not on this base model {model!r}"
        )
    if special := config.special():
        raise RefusedError(f"{path}: only plain LoRA can be loaded; this one has {', '.join(special)}")
    return config
