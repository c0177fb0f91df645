"""How many positions of an example are trained."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loops_async import Datum
from loops_async.protocol import LOSSES, checked_loss_data

numbers = st.sampled_from([0.0, -0.0, 1.0, -0.5])


@st.composite
def examples(draw: st.DrawFn) -> tuple[str, Datum]:
    """Return a loss, and an example of it without targets that are not scored beside weights."""
    loss, length = draw(st.sampled_from(["cross_entropy", "ppo", "dpo"])), draw(st.integers(1, 6))
    width = draw(st.integers(1, 3)) if loss == "cross_entropy" else 1
    shape = [length] if width == 1 else [length, width]

    def tensor(values: st.SearchStrategy[float] | st.SearchStrategy[int]) -> list[object]:
        flat = draw(st.lists(values, min_size=length * width, max_size=length * width))
        return flat if len(shape) == 1 else [flat[at : at + width] for at in range(0, len(flat), width)]

    excluding = LOSSES[loss].excluding
    inputs: dict[str, object] = {name: [0.0] * length for name in LOSSES[loss].required}
    has_factors = excluding in LOSSES[loss].required or draw(st.booleans())
    inputs["target_tokens"] = tensor(st.integers(0, 9) if has_factors else st.sampled_from([3, -100]))
    if has_factors:
        inputs[excluding] = [draw(numbers)] if loss == "ppo" and draw(st.booleans()) else tensor(numbers)
    return loss, Datum(model_input=[1] * length, loss_fn_inputs=inputs)  # type: ignore[arg-type]  # drawn


@given(examples())
def test_it_is_the_number_of_positions_that_count(example: tuple[str, Datum]) -> None:
    loss, datum = example
    list(checked_loss_data(loss, [datum, datum], 2))
    assert LOSSES[loss].trained(datum) == sum(LOSSES[loss].counted(datum))
