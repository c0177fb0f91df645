"""Training examples of sampled tokens, for the losses of reinforcement learning."""

from __future__ import annotations

from collections.abc import Sequence

from .types import Datum, EncodedTextChunk, ModelInput, TensorData

__all__ = ["policy_datum"]


def policy_datum(
    tokens: Sequence[int], logprobs: Sequence[float], advantages: Sequence[float], mask: Sequence[float] | None = None
) -> Datum:
    """Return the example whose position i holds token i, and whose target is token i + 1.

    All arguments speak of the same tokens, so that the first entry of all but `tokens` is not used.
    """
    # Made of finished parts: given lists, `Datum` would have to find their dtypes.
    inputs = {
        "target_tokens": _targets(tokens, "int64"),
        "logprobs": _targets(logprobs, "float32"),
        "advantages": _targets(advantages, "float32"),
    }
    if mask is not None:
        inputs["mask"] = _targets(mask, "float32")
    return Datum(model_input=ModelInput([EncodedTextChunk(tokens[:-1])]), loss_fn_inputs=inputs)


def _targets(values: Sequence[float], dtype: str) -> TensorData:
    """Return what belongs to each position's target: the values from the second token on."""
    data: list[bool | int | float | None] = [*values]
    del data[0]
    return TensorData(data=data, dtype=dtype, shape=[len(data)])
