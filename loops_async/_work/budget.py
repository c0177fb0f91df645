"""A limit of what a session may use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, TypeAlias

from msgspec.structs import replace

from ..errors import BudgetExceededError, InputError
from ..types import Prices, Usage
from .usage import COUNTED, Counts

__all__ = ["Budget"]

log = logging.getLogger("loops_async")

OnExceeded: TypeAlias = Literal["raise", "warn"] | Callable[[BudgetExceededError], object]

OF_DATA: Final = frozenset({"prompt_tokens", "completion_tokens", "trained_tokens", "datums", "samples", "operations"})
"""Of these, it is known beforehand what a call adds, of completions at least one token each."""


class Budget:
    """Limits of what a session may use, in the terms of `Usage`, or of its `cost`.

    A sample or an operation that would go beyond a limit is refused with a `BudgetExceededError` before anything is
    sent. What is under way continues, and counts as if it generated all that it may (``max_tokens``). So limits of what
    calls ask for are never exceeded; ``completion_tokens`` and ``cost`` may be, by the completions of one call. What a
    call adds to ``requests``, ``retries``, bytes and ``up_seconds`` is not known before: calls are refused once such a
    limit is reached. Operations without data, e.g. ``optim_step`` and ``save_state``, are refused by the limit
    ``operations`` alone, so that what was trained can be saved. The limits count everything since the session was
    opened, also what was used before the budget was set.

    Args:
        cost: a limit of ``Usage.cost(prices)``; needs `prices`.
        prices: what things cost; with them, errors also say what a call would have cost.
        on_exceeded: ``"raise"`` refuses the call, ``"warn"`` logs one warning for each limit and lets it pass. A
            function gets the error, may raise it or another one, and lets the call pass if it returns; it is called
            before the call is sent and must return quickly.

    Raises:
        InputError: a limit is no number of at least 0, or `cost` has no prices.

    Example:
        ::

            budget = loops.Budget(completion_tokens=10_000_000, up_seconds=8 * 3600)
            service.budget = budget
    """

    def __init__(
        self,
        *,
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
        trained_tokens: int | None = None,
        datums: int | None = None,
        samples: int | None = None,
        operations: int | None = None,
        requests: int | None = None,
        retries: int | None = None,
        bytes_sent: int | None = None,
        bytes_received: int | None = None,
        up_seconds: float | None = None,
        cost: float | None = None,
        prices: Prices | None = None,
        on_exceeded: OnExceeded = "raise",
    ) -> None:
        given: dict[str, float | None] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "trained_tokens": trained_tokens,
            "datums": datums,
            "samples": samples,
            "operations": operations,
            "requests": requests,
            "retries": retries,
            "bytes_sent": bytes_sent,
            "bytes_received": bytes_received,
            "up_seconds": up_seconds,
            "cost": cost,
        }
        self._limits = {name: _checked(limit, name) for name, limit in given.items() if limit is not None}
        if prices is not None and not isinstance(prices, Prices):
            raise InputError("prices", f"must be Prices; got {type(prices).__name__}")
        if cost is not None and prices is None:
            raise InputError("prices", "are needed for a limit of `cost`: the library knows none")
        if on_exceeded not in ("raise", "warn") and not callable(on_exceeded):
            raise InputError("on_exceeded", f"must be 'raise', 'warn' or a function; got {on_exceeded!r}")
        self._prices = prices
        self._on_exceeded: OnExceeded = on_exceeded
        self._warned: set[str] = set()

    @property
    def limits(self) -> dict[str, float]:
        """The limits that were given, by their names."""
        return dict(self._limits)

    @property
    def prices(self) -> Prices | None:
        """The prices that were given."""
        return self._prices

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={limit:g}' for name, limit in self._limits.items())})"


def check_budget(budget: Budget, used: Usage, asked: Counts, what: str) -> None:
    """Do what `budget` says if a call that asks for `asked` would go beyond it; `used` includes what is under way.

    Raises:
        BudgetExceededError: it would, and the budget does not let it pass.
    """
    for error in _exceeded(budget, used, asked, what):
        on_exceeded = budget._on_exceeded  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - of users, not of us
        warned = budget._warned  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - as above
        if on_exceeded == "raise":
            raise error
        if on_exceeded != "warn":
            on_exceeded(error)
        elif error.limit not in warned:
            warned.add(error.limit)
            log.warning("%s", error)


def _exceeded(budget: Budget, used: Usage, asked: Counts, what: str) -> Iterator[BudgetExceededError]:
    has_data = asked.datums > 0 or asked.samples > 0
    after = replace(used, **{name: getattr(used, name) + getattr(asked, name) for name in COUNTED})
    for name, most in budget.limits.items():
        if name != "operations" and not has_data:
            continue
        before, then = _value(used, name, budget.prices), _value(after, name, budget.prices)
        if then > most or (name not in OF_DATA and name != "cost" and before >= most):
            yield _error(name, most, before, then, what, used, after, budget.prices)


def _value(usage: Usage, name: str, prices: Prices | None) -> float:
    if name == "cost":
        return 0.0 if prices is None else usage.cost(prices)
    value: float = getattr(usage, name)
    return value


def _error(
    name: str, most: float, before: float, then: float, what: str, used: Usage, after: Usage, prices: Prices | None
) -> BudgetExceededError:
    cost = "" if prices is None else f" It would have cost at least {after.cost(prices) - used.cost(prices):.6g}."
    message = (
        f"{what} was not sent, since the budget allows {name}={most:,.10g}: {before:,.10g} are used or under way, and "
        f"it would make that at least {then:,.10g}.{cost} What is under way goes on. To allow more, set another "
        "budget: service.budget = Budget(...)"
    )
    return BudgetExceededError(message, limit=name, most=most, used=before, would_be=then)


def _checked(limit: Any, name: str) -> float:
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < float("inf"):
        raise InputError(name, f"must be a finite number of at least 0, or None for no limit; got {limit!r}")
    return limit
