"""Model inputs, training examples, and where their tokens come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias

from ._value import Value
from .tensors import TensorData, TensorDtype, as_tensor

__all__ = [
    "Datum",
    "DmelChunk",
    "EncodedTextChunk",
    "ImageAssetPointerChunk",
    "ImageChunk",
    "LossFnInputs",
    "ModelInput",
    "ModelInputChunk",
    "PromptProvenanceSpan",
    "ProvenanceSpans",
    "SampledProvenanceSpan",
]

DTYPES: Final[Mapping[str, TensorDtype]] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}
"""The dtype of plain lists among the inputs of a loss."""

LossFnInputs: TypeAlias = dict[str, TensorData]


@dataclass(frozen=True, kw_only=True)
class EncodedTextChunk(Value):
    """A piece of text, as token ids; the list is copied."""

    tokens: Sequence[int]
    type: Literal["encoded_text"] = "encoded_text"

    def __post_init__(self) -> None:
        given: Any = self.tokens
        object.__setattr__(self, "tokens", given.tolist() if hasattr(given, "tolist") else list(given))

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class ImageChunk(Value):
    """An image: the bytes of a file, and the number of positions that it takes."""

    data: bytes
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    type: Literal["image"] = "image"

    @property
    def length(self) -> int:
        """The number of positions, which must have been given."""
        return _expected(self.expected_tokens)


@dataclass(frozen=True, kw_only=True)
class ImageAssetPointerChunk(Value):
    """An image that the service has stored; Loops has no such store, so it is refused when it is sent."""

    format: Literal["png", "jpeg"]
    location: str
    expected_tokens: int | None = None
    type: Literal["image_asset_pointer"] = "image_asset_pointer"

    @property
    def length(self) -> int:
        """The number of positions, which must have been given."""
        return _expected(self.expected_tokens)


@dataclass(frozen=True, kw_only=True)
class DmelChunk(Value):
    """A piece of audio; Loops has no audio, so it is refused when it is sent."""

    dmel: bytes
    type: Literal["dmel"] = "dmel"

    @property
    def length(self) -> int:
        """Not known here."""
        raise ValueError("the number of positions of audio is not known")


def _expected(tokens: int | None) -> int:
    if tokens is None:
        raise ValueError("expected_tokens must be given to know the length of an image")
    return tokens


ModelInputChunk: TypeAlias = EncodedTextChunk | ImageChunk | ImageAssetPointerChunk | DmelChunk
_CHUNKS: Final = (EncodedTextChunk, ImageChunk, ImageAssetPointerChunk, DmelChunk)


@dataclass(frozen=True, kw_only=True)
class ModelInput(Value):
    """The input of a model: chunks of text and images, in order.

    Example:
        >>> from loops_tinker import ModelInput
        >>> ModelInput.from_ints([1, 2]).append_int(3).to_ints()
        [1, 2, 3]
    """

    chunks: list[ModelInputChunk]

    def __post_init__(self) -> None:
        for index, chunk in enumerate(self.chunks):
            if not isinstance(chunk, _CHUNKS):
                raise ValueError(f"chunks[{index}] must be a chunk; got {type(chunk).__name__}")
        object.__setattr__(self, "chunks", list(self.chunks))

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        """Make an input of one text chunk."""
        return cls(chunks=[EncodedTextChunk(tokens=tokens)])

    @classmethod
    def empty(cls) -> ModelInput:
        """Make an input without chunks."""
        return cls(chunks=[])

    @property
    def length(self) -> int:
        """The number of positions."""
        return sum(chunk.length for chunk in self.chunks)

    def to_ints(self) -> list[int]:
        """Return the token ids; raises `ValueError` where a chunk is no text."""
        tokens: list[int] = []
        for chunk in self.chunks:
            if not isinstance(chunk, EncodedTextChunk):
                raise ValueError(f"to_ints needs an input of text only; it has a chunk {type(chunk).__name__}")
            tokens += chunk.tokens
        return tokens

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """Return a copy with one more chunk."""
        return ModelInput(chunks=[*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """Return a copy with one more chunk, of one token."""
        return self.append(EncodedTextChunk(tokens=[token]))


@dataclass(frozen=True, kw_only=True)
class _Span(Value):
    sequence_id: str
    offset: int = 0
    length: int

    def __post_init__(self) -> None:
        if not self.sequence_id:
            raise ValueError("sequence_id must not be empty")
        if self.offset < 0 or self.length < 0:
            raise ValueError(f"offset and length must not be negative; got {self.offset} and {self.length}")


class PromptProvenanceSpan(_Span):
    """Positions that hold the prompt of a sampled sequence, from `offset` on."""


class SampledProvenanceSpan(_Span):
    """Positions that hold the tokens of a sampled sequence, from `offset` on."""


ProvenanceSpans: TypeAlias = Sequence[PromptProvenanceSpan | SampledProvenanceSpan]


@dataclass(frozen=True)
class Datum(Value):
    """One training example.

    `loss_fn_inputs` may be tensors, arrays of numpy or torch, and lists of those inputs whose dtype is known. The spans
    say where tokens were sampled; no loss of Loops reads them.

    Raises:
        KeyError: a list stands under a name that no loss has, so that its dtype is not known.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    model_input_spans: ProvenanceSpans | None = None
    loss_fn_input_spans: ProvenanceSpans | None = None

    def __post_init__(self) -> None:
        tensors = {name: _input(name, value) for name, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", tensors)

    def with_provenance(self, *, model_input: ProvenanceSpans, loss_fn_inputs: ProvenanceSpans) -> Datum:
        """Return a copy whose positions, and those of its targets, come from these spans, which must tile them."""
        targets = self.loss_fn_inputs.get("target_tokens")
        positions = self.model_input.length
        _check_tiles("model_input", model_input, positions)
        _check_tiles("loss_fn_inputs", loss_fn_inputs, positions if targets is None else len(targets.tolist()))
        return replace(self, model_input_spans=tuple(model_input), loss_fn_input_spans=tuple(loss_fn_inputs))


def _input(name: str, value: Any) -> TensorData:
    is_list = isinstance(value, Sequence)
    return as_tensor(value, DTYPES[name] if is_list else None)


def _check_tiles(name: str, spans: ProvenanceSpans, positions: int) -> None:
    covered = sum(span.length for span in spans)
    if covered != positions:
        raise ValueError(f"{name}: the spans must cover {positions} positions; they cover {covered}")
