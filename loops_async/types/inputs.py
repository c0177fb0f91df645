"""Model inputs of token and image chunks, and training examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import force_setattr

from .._values import Value
from ..errors import InputError
from .array_numbers import array_numbers, keep_arrays, kept_numbers
from .tensors import ArrayLike, SupportsToList, TensorData, is_list_like, plain_number, plain_scalars

__all__ = ["Datum", "EncodedTextChunk", "ExternalRef", "ImageAssetPointerChunk", "ImageChunk", "ModelInput"]


_FORMATS: Final = ("png", "jpeg")


class EncodedTextChunk(Value, Struct, frozen=True, tag="encoded_text", tag_field="type"):
    """A piece of text, as token ids."""

    tokens: list[int]

    if TYPE_CHECKING:

        def __init__(self, tokens: Sequence[int] | SupportsToList) -> None: ...

    def __post_init__(self) -> None:
        # A copy: what is done to the caller's list later must not change what is sent.
        given = kept_numbers(self, "tokens")
        numbers = array_numbers(given) if len(getattr(given, "shape", ())) == 1 else None
        is_array = numbers is not None and numbers.are_integers()
        force_setattr(self, "tokens", numbers if is_array else token_ids(given, path="tokens"))

    @property
    def length(self) -> int:
        """Positions that the chunk takes in the model's input."""
        return len(kept_numbers(self, "tokens"))


keep_arrays(EncodedTextChunk, "tokens")


class ImageChunk(Value, Struct, frozen=True, tag="image", tag_field="type", kw_only=True):
    """An image, as the bytes of a PNG or JPEG file (base64 on the wire).

    `expected_tokens` is the number of positions that the image takes in the model's input; the service checks it.
    """

    data: bytes
    format: Literal["png", "jpeg"]
    expected_tokens: Annotated[int, Meta(gt=0)]

    def __post_init__(self) -> None:
        if not isinstance(self.data, bytes | bytearray):
            raise InputError("data", f"expected the bytes of an image file, got {type(self.data).__name__}")
        if self.format not in _FORMATS:
            raise InputError("format", f"must be 'png' or 'jpeg'; got {self.format!r}")
        expected: Any = plain_number(self.expected_tokens)
        if isinstance(expected, bool) or not isinstance(expected, int) or expected < 1:
            raise InputError("expected_tokens", f"must be a whole number of at least 1; got {expected!r}")
        force_setattr(self, "data", bytes(self.data))
        force_setattr(self, "expected_tokens", expected)

    @classmethod
    def from_bytes(cls, raw: bytes, fmt: Literal["png", "jpeg"], expected_tokens: int) -> ImageChunk:
        """Make a chunk from the bytes of an image file."""
        if fmt not in _FORMATS:
            raise InputError("fmt", f"must be 'png' or 'jpeg'; got {fmt!r}")
        return cls(data=raw, format=fmt, expected_tokens=expected_tokens)

    def to_bytes(self) -> bytes:
        """Return the bytes of the image file."""
        return self.data

    @property
    def length(self) -> int:
        """Positions that the chunk takes in the model's input."""
        return self.expected_tokens


class ImageAssetPointerChunk(Value, Struct, frozen=True, tag="image_asset_pointer", tag_field="type"):
    """A chunk type of the wire format that no Loops service accepts; the constructor always raises `InputError`."""

    location: str = ""

    def __post_init__(self) -> None:
        raise InputError("chunks", "image_asset_pointer is not supported by Loops; send an ImageChunk instead")


Chunk: TypeAlias = EncodedTextChunk | ImageChunk | ImageAssetPointerChunk


class ModelInput(Value, Struct, frozen=True):
    """The input of a model: chunks of text and images, in order.

    Example:
        >>> from loops_async import ModelInput
        >>> ModelInput.from_ints([1, 2]).append_int(3).to_ints()
        [1, 2, 3]
    """

    chunks: list[Chunk] = []

    def __post_init__(self) -> None:
        if isinstance(self.chunks, list):
            force_setattr(self, "chunks", self.chunks.copy())  # what is done to the caller's list later changes nothing

    @classmethod
    def from_ints(cls, tokens: Sequence[int] | SupportsToList) -> ModelInput:
        """Make an input of one text chunk from token ids (a list or any integer array)."""
        return text_input(tokens, path="tokens")

    @classmethod
    def empty(cls) -> ModelInput:
        """Make an input without chunks."""
        return cls([])

    @property
    def length(self) -> int:
        """Positions of the whole input."""
        return sum(chunk.length for chunk in self.chunks if not isinstance(chunk, ImageAssetPointerChunk))

    @property
    def has_images(self) -> bool:
        """Whether any chunk is an image."""
        return any(isinstance(chunk, ImageChunk) for chunk in self.chunks)

    def to_ints(self) -> list[int]:
        """Return the token ids; raises `TypeError` when there are images."""
        tokens: list[int] = []
        for chunk in self.chunks:
            if not isinstance(chunk, EncodedTextChunk):
                raise TypeError(f"to_ints needs an input of text only; it has a chunk {type(chunk).__name__}")
            tokens += chunk.tokens
        return tokens

    def to_positions(self) -> list[int | None]:
        """Return the token at each position; None at the positions of an image."""
        positions: list[int | None] = []
        for chunk in self.chunks:
            if isinstance(chunk, EncodedTextChunk):
                positions += chunk.tokens
            elif isinstance(chunk, ImageChunk):
                positions += [None] * chunk.length
        return positions

    def append(self, chunk: Chunk) -> ModelInput:
        """Return a copy with one more chunk."""
        return ModelInput([*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """Return a copy with one more token."""
        if self.chunks and isinstance(last := self.chunks[-1], EncodedTextChunk):
            return ModelInput([*self.chunks[:-1], EncodedTextChunk([*last.tokens, token])])
        return self.append(EncodedTextChunk([token]))


class ExternalRef(Value, Struct, frozen=True, kw_only=True):
    """A reference to data that the service stores, e.g. captured expert routing."""

    uri: str
    version: Annotated[int, Meta(ge=1)]


class Datum(Value, Struct, frozen=True, kw_only=True):
    """One training example.

    `model_input` has N positions; the tensors of `loss_fn_inputs` hold the values that the loss needs at each position,
    e.g. ``target_tokens`` int64 of shape (N,) and ``weights`` float32 of shape (N,). The service does not shift the
    targets: the target at position i is the token that follows position i. Tensors may be given as lists, numpy arrays
    or torch tensors, `model_input` as a list of token ids.

    Example:
        >>> from loops_async import Datum
        >>> datum = Datum(model_input=[5, 6], loss_fn_inputs={"target_tokens": [6, 7], "weights": [0.0, 1.0]})
        >>> datum.loss_fn_inputs["weights"].dtype
        'float32'
    """

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData] = {}
    routed_experts_ref: ExternalRef | None | UnsetType = UNSET

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            model_input: ModelInput | Sequence[int] | SupportsToList,
            loss_fn_inputs: Mapping[str, ArrayLike] = ...,
            routed_experts_ref: ExternalRef | None | UnsetType = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        given: Any = self.model_input
        if not isinstance(given, ModelInput):
            force_setattr(self, "model_input", text_input(given, path="model_input"))
        inputs: Mapping[str, Any] = self.loss_fn_inputs
        if not isinstance(inputs, Mapping):
            raise InputError("loss_fn_inputs", f"expected a dict of tensors, got {type(inputs).__name__}")
        # A copy of the dict, for the same reason as the tokens'.
        tensors = {name: TensorData.of(value, path=f"loss_fn_inputs[{name!r}]") for name, value in inputs.items()}
        force_setattr(self, "loss_fn_inputs", tensors)


def text_input(tokens: Any, *, path: str) -> ModelInput:
    """Return an input of one text chunk; `path` is the argument's name in errors."""
    try:
        return ModelInput([EncodedTextChunk(tokens)])
    except InputError as refused:
        raise InputError(path, str(refused).removeprefix(f"{refused.path}: ")) from None


def token_ids(tokens: Any, *, path: str) -> list[int]:
    """Return `tokens` as a list of Python ints; `path` is the argument's name in errors."""
    listed = tokens if is_list_like(tokens) else tokens.tolist() if isinstance(tokens, SupportsToList) else None
    if not is_list_like(listed):
        hint = _hint(tokens)
        raise InputError(path, f"expected a list or an array of token ids, got {type(tokens).__name__}{hint}")
    try:
        return msgspec.convert(listed, list[int])  # checks and copies several times faster than a loop
    except msgspec.ValidationError:
        listed = plain_scalars(listed)
    if others := set(map(type, listed)) - {int}:
        kinds = ", ".join(sorted(kind.__name__ for kind in others))
        hint = "; this is a batch: give one row" if any(map(is_list_like, listed)) else ""
        raise InputError(path, f"expected integers as token ids, got {kinds}{hint}")
    return listed


def _hint(tokens: object) -> str:
    """Say where the token ids are in what was given instead of them."""
    if isinstance(tokens, str):
        return "; encode it first (get_tokenizer)"
    if hasattr(tokens, "ids"):  # tokenizers.Encoding
        return "; give its .ids"
    return '; give its ["input_ids"]' if isinstance(tokens, Mapping) and "input_ids" in tokens else ""


# `msgspec` resolves annotations lazily; resolving them here turns a mistake into an import error.
msgspec.json.Decoder(Datum)
