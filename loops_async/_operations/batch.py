"""Batches of datums: encoded datum by datum, split if too large for one request, with the results merged again.

msgspec holds the interpreter lock while it encodes, so a worker thread would not help: a batch is encoded datum by
datum instead, and sent from the buffer it was encoded into, so that no body is copied.

Source: data-plane reference 1.7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from .._http.body import Body, Pacer
from .._journal.content import Content, digest
from ..errors import InputError, UnsupportedError
from ..protocol import LOSSES, MAX_REQUEST_BYTES, SKIP_NORMALIZATION, ForwardBody, encode, encode_into
from ..types import Datum, ForwardBackwardOutput
from .operation import MakeBody

_HEAD: Final = b'{"data":'
_NO_DATA: Final = b"[]"
"""The datums are the first field of an encoded `ForwardBody`, so they can be inserted between head and tail."""

_REDUCTIONS: Final[Mapping[str, Callable[[Sequence[float]], float]]] = {"sum": sum, "min": min, "max": max}


class DatumArray(Struct):
    """A JSON array of `count` datums, which have `tokens` positions; `sizes` are the numbers of bytes of each."""

    json: bytearray
    count: int
    tokens: int = 0
    sizes: list[int] = []


class Batch:
    """A forward pass over datums, with or without a backward pass. `body` is its request body without the datums.

    Each datum is taken from `data` when it is encoded; there, an iterator may raise the error of an invalid one.
    """

    result = ForwardBackwardOutput
    is_dependent = False

    def __init__(self, name: str, data: Iterable[Datum], body: ForwardBody) -> None:
        self.name = name
        self.loss_fn: str | None = body.loss_fn
        self._data = data
        self._body = body

    async def encode(self) -> EncodedBatch:
        """Encode the datums, split into as many parts as the size limit requires."""
        overhead = len(_HEAD) + len(_NO_DATA) + len(_encode_tail(self._body, 1 << 62))
        rule, trained = LOSSES[self._body.loss_fn], 0

        def counted() -> Iterator[Datum]:
            nonlocal trained
            for datum in self._data:
                trained += rule.trained(datum)
                yield datum

        data = counted() if self.name == "forward_backward" else self._data
        arrays = await encode_data(data, group=rule.group, overhead=overhead)
        return EncodedBatch(self.name, arrays, self._body, trained_tokens=trained)


class EncodedBatch:
    """The parts of a batch, each of which is one request."""

    def __init__(self, name: str, parts: Sequence[DatumArray], body: ForwardBody, *, trained_tokens: int) -> None:
        self._name = name
        self._parts = parts
        self._body = body
        self._is_backward = name == "forward_backward"
        self.trained_tokens = trained_tokens

    @property
    def bodies(self) -> Sequence[MakeBody]:
        return [partial(self._body_of, part) for part in self._parts]

    @property
    def datums(self) -> Sequence[int]:
        return [part.count for part in self._parts]

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self._parts)

    def _body_of(self, part: DatumArray, seq_id: int) -> Body:
        return Body(_HEAD, part.json, _encode_tail(self._body, seq_id))

    def content(self) -> Content:
        """Return what identifies the batch."""
        return Content(self._name, encode(self._body), b"".join(map(_digests, self._parts)))

    def merge(self, results: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
        """Merge the results of the parts.

        Raises:
            UnsupportedError: the trainer has normalised although it should not.
        """
        output = merged(results, self.datums)
        asked = (self._body.loss_fn_config or {}).get(SKIP_NORMALIZATION)
        if self._is_backward and asked and output.metrics.get(SKIP_NORMALIZATION) != 1.0:
            raise UnsupportedError(
                f"the trainer does not confirm {SKIP_NORMALIZATION} for {self._body.loss_fn}: it has added gradients "
                "that optim_step divides by the number of tokens. Load the last saved state to drop them"
            )
        return output


def _digests(array: DatumArray) -> bytes:
    """Return the digest of each datum, joined."""
    view, start, made = memoryview(array.json), 1, bytearray()
    for size in array.sizes:
        made += digest(view[start : start + size])
        start += size + 1  # and a comma
    return bytes(made)


def _encode_tail(body: ForwardBody, seq_id: int) -> bytes:
    """Encode the part of a body that follows its datums."""
    return encode(replace(body, seq_id=seq_id)).removeprefix(_HEAD + _NO_DATA)


async def encode_data(data: Iterable[Datum], *, group: int, overhead: int) -> list[DatumArray]:
    """Encode datums and split them, in order, into as few bodies as the size limit allows.

    Each body is written into one growing buffer: the allocator keeps a large block for the next batch, but returns
    many small ones to the system, and allocating those again is expensive.

    Args:
        data: the datums.
        group: the number of consecutive datums that must stay in one body (2 for the pairs of dpo).
        overhead: bytes of each body in addition to its datums and the commas between them.

    Raises:
        InputError: a single group is too large, or a value in it is not JSON serializable.
    """
    pacer = Pacer()
    limit = MAX_REQUEST_BYTES - overhead + 1  # every datum is counted with a comma, but the last one has none
    arrays = [DatumArray(bytearray(b"["), 0)]
    numbered = enumerate(data)
    while together := list(islice(numbered, group)):
        array, start = arrays[-1], together[0][0]
        before, sizes = len(array.json), list[int]()
        for index, datum in together:
            begin = len(array.json)
            try:
                encode_into(datum, array.json, -1)
            except TypeError as error:
                raise InputError(f"data[{index}]", str(error)) from None
            sizes.append(len(array.json) - begin)
            array.json += b","
            await pacer.pause()
        size = len(array.json) - before
        if size > limit:
            raise InputError(
                f"data[{start}]", f"is {size:,} bytes of JSON; one request holds at most {limit:,}. Shorten it"
            )
        if len(array.json) - 1 > limit:
            arrays.append(DatumArray(bytearray(b"[") + array.json[before:], 0))
            del array.json[before:]
        arrays[-1].count += group
        arrays[-1].tokens += sum(datum.model_input.length for _, datum in together)
        arrays[-1].sizes += sizes
    for array in arrays:
        array.json[-1:] = b"]"
    return arrays


def merged(parts: Sequence[ForwardBackwardOutput], counts: Sequence[int]) -> ForwardBackwardOutput:
    """Merge the results of several passes; `counts` are their numbers of datums.

    Outputs are concatenated; the loss and each metric are means over the parts that have them, weighted by the number
    of datums. But metrics whose names end in ``:sum``, ``:min`` or ``:max`` are reduced in that way, and
    ``skip_token_normalization`` is 1 if it is set in every part, else 0.
    """
    if len(parts) == 1:
        return parts[0]
    names = {name: None for part in parts for name in part.metrics}
    return ForwardBackwardOutput(
        loss=_weighted_mean([part.loss for part in parts], counts),
        loss_fn_output_type=next((part.loss_fn_output_type for part in parts if part.loss_fn_output_type), ""),
        loss_fn_outputs=[output for part in parts for output in part.loss_fn_outputs],
        metrics={name: _merged_metric(name, parts, counts) for name in names},
    )


def _merged_metric(name: str, parts: Sequence[ForwardBackwardOutput], counts: Sequence[int]) -> float:
    present = [(part.metrics[name], count) for part, count in zip(parts, counts, strict=True) if name in part.metrics]
    if name == SKIP_NORMALIZATION:
        return float(len(present) == len(parts) and all(value for value, _ in present))
    values = [value for value, _ in present]
    if reduce := _REDUCTIONS.get(name.rpartition(":")[2]):
        return float(reduce(values))
    return _weighted_mean(values, [count for _, count in present])


def _weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
