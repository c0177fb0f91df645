"""How an adaptive limit finds the number of sequences in flight at which a sampler is fastest."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from .._arguments import check_kind
from .._values import Value
from ..errors import InputError

WORTH: Final = 0.12
"""A larger limit is better if the rate gains at least this share of the growth."""
STEEP: Final = 0.7
"""From this share, the next growth is larger."""
MOST_GROWTH: Final = 2.0
GROWTH: Final = 1.15
LEAST_GROWTH: Final = 1.02
"""Finer steps are of use where too large a limit is refused, since that is certain at once."""
FALL: Final = 0.8
"""At less than this share of the former rate, the sampler has become slower."""
SLOWER: Final = 0.7
"""The factor for a sampler that has become slower."""
OVERLOADED: Final = 0.85
"""The factor for a sampler that has too many requests."""
REACHED: Final = 0.8
"""From this share of it in flight, or when sequences wait, the rate says something of the limit."""
FEWEST: Final = 8
"""The fewest sequences of a round."""
MOST_PATIENCE: Final = 32
"""The most rounds until the neighbours are measured again."""
CERTAINTY: Final = 0.25
"""A round is longer if its rate is less certain than this share of the growth that it measures."""
MOST_ROUND: Final = 8
"""The longest round, in multiples of the limit."""

_Count = Annotated[int, Meta(ge=1)]


class Adaptive(Value, Struct, frozen=True, kw_only=True):
    """A limit of sequences in flight that follows the capacity of the sampler.

    It starts at `initial` and stays between `minimum` and `maximum`. It grows while the sampler generates more tokens
    per second for it, returns to the smallest limit that is about as fast, and shrinks when the sampler becomes slower
    or answers 429 or 503. It changes only while about that many sequences are in flight: otherwise a change would have
    no effect that can be measured.

    Example:
        ::

            results = sampler.sample_many(prompts, limit=loops.Adaptive(maximum=512))
    """

    initial: _Count = 16
    minimum: _Count = 1
    maximum: _Count = 4096


class HillClimb:
    """The control law of `Adaptive`: a climb to the limit with the best rate, fed with events and the time.

    A round ends when half as many sequences as the limit have begun and finished in it, or more if they differ much.
    Its rate in tokens per second is ``sum of tokens / sum of costs``, where a sequence costs ``1 / n`` seconds for each
    second in which `n` are in flight (Little's law). So it depends neither on how long the sequences are that happen to
    finish in the round, nor on those that began before it, at another limit.

    Raises:
        InputError: a bound is not a whole number of at least 1, or `minimum` exceeds `maximum`.
    """

    def __init__(self, adaptive: Adaptive) -> None:
        adaptive = check_kind(adaptive, Adaptive, "limit")
        if adaptive.minimum > adaptive.maximum:
            raise InputError("limit.minimum", f"must not exceed maximum={adaptive.maximum}; got {adaptive.minimum}")
        self._bounds = adaptive
        self._now: float | None = None
        self.clock: float = 0.0
        """What a sequence costs that is in flight all the time."""
        self._is_reached = False
        self._base: tuple[int, float] | None = None
        """The limit with the best known rate, and that rate. At another limit, the round measures a neighbour."""
        self._is_upward = True
        self._growth = MOST_GROWTH
        self._refused_neighbours = 0
        self._patience = 1
        self._rest = 0
        """Rounds until the neighbours are measured."""
        self._draining = 0
        """Sequences of the last overload that have not finished."""
        self._largest = 1
        self._move(adaptive.initial)

    # --- events ---

    def occupied(self, now: float, in_flight: int, waiting: int) -> None:
        """Count the time since the last event, in which so many sequences were in flight and waited."""
        if self._now is not None and in_flight:
            self.clock += (now - self._now) / in_flight
        self._now = now
        self._is_reached = waiting > 0 or in_flight >= REACHED * self.limit

    def finished(self, count: int, tokens: int, began: float) -> None:
        """Count a request for `count` sequences that was admitted when `clock` was `began`; call `occupied` before."""
        self._draining -= count
        if not self._is_reached:
            self._miss(count)
            return
        if began < self._begun:
            return
        self._sequences += count
        self._largest = max(self._largest, count)
        cost = (self.clock - began) * count
        self._tokens += tokens
        self._cost += cost
        self._squares += tokens * tokens
        self._products += tokens * cost
        self._cost_squares += cost * cost
        if self._sequences >= max(self.limit / 2, FEWEST) and self._cost > 0:
            rate = self._tokens / self._cost
            if self._sequences >= self.limit * MOST_ROUND or self._is_certain(rate):
                self._judge(rate)

    def rejected(self) -> None:
        """Shrink on a 429 or 503, once for all that come until those in flight have finished."""
        if self._draining > 0:
            return
        limit = int(self.limit * OVERLOADED)
        if self._base and self._base[0] < self.limit:  # it was an attempt at growing
            limit = max(limit, self._base[0])
            growth = max(1 + (min(self._growth, GROWTH) - 1) / 2, LEAST_GROWTH)
            self._be_patient()
        else:
            growth = GROWTH
            self._patience = self._rest = 1
        self._restart(limit, is_upward=True, growth=growth)
        self._draining = self.limit

    def _miss(self, count: int) -> None:
        """Withdraw an attempt at growing if the limit is not reached: its rate would never be known."""
        self._missed += count
        if self._missed > self.limit and self._base and self._base[0] < self.limit:
            self._growth = GROWTH
            self._be_patient()
            self._move(self._base[0])

    def _is_certain(self, rate: float) -> bool:
        """Whether the standard error of the rate, as a ratio of sums, is small beside the growth."""
        variance = self._squares - 2 * rate * self._products + rate * rate * self._cost_squares
        error = CERTAINTY * (self._growth - 1) * self._tokens
        return variance <= error * error

    # --- decisions ---

    def _judge(self, rate: float) -> None:
        """Decide where the next round takes place."""
        if self._base is None:
            self._stay(rate)
        elif self._base[0] != self.limit:
            self._compare(*self._base, rate)
        elif rate >= FALL * self._base[1]:
            self._stay((self._base[1] + rate) / 2)
        else:
            self._patience, self._rest = 1, 0
            self._restart(int(self.limit * SLOWER), is_upward=False, growth=1 / SLOWER)

    def _stay(self, rate: float) -> None:
        self._base = self.limit, rate
        self._rest -= 1
        if self._rest > 0:
            self._begin()
        else:
            self._refused_neighbours = 0
            self._try_neighbour(self.limit)

    def _compare(self, base: int, base_rate: float, rate: float) -> None:
        """Go on from a better neighbour, else look at the one on the other side, else return."""
        (small, slow), (large, fast) = sorted([(base, base_rate), (self.limit, rate)])
        gain = (fast / slow - 1) / (large / small - 1) if slow else float(fast > 0)
        if (gain >= WORTH) == (self.limit == large):
            self._base = self.limit, rate
            self._growth = min(2 * self._growth - 1, MOST_GROWTH if gain >= STEEP else GROWTH)
            self._refused_neighbours, self._patience = 0, 1
            self._try_neighbour(self.limit)
            return
        self._is_upward, self._growth = not self._is_upward, GROWTH
        self._refused_neighbours += 1
        if self._refused_neighbours < 2:
            self._try_neighbour(base)
        else:
            self._be_patient()
            self._move(base)

    def _be_patient(self) -> None:
        self._rest = self._patience
        self._patience = min(2 * self._patience, MOST_PATIENCE)

    def _try_neighbour(self, base: int) -> None:
        """Move by at least one request, since a smaller step would change nothing."""
        if self._is_upward:
            self._move(max(round(base * self._growth), base + self._largest))
        else:
            self._move(min(round(base / self._growth), base - self._largest))
        if self.limit == base:  # at a bound
            self._is_upward = not self._is_upward

    def _restart(self, limit: int, *, is_upward: bool, growth: float) -> None:
        """Move to a limit whose rate is unknown, and which is the base whatever its rate is."""
        self._base = None
        self._is_upward, self._growth = is_upward, growth
        self._move(limit)

    def _move(self, limit: int) -> None:
        # Below the size of a request, which runs alone then, all limits are equal.
        self.limit: int = min(max(limit, self._largest, self._bounds.minimum), self._bounds.maximum)
        self._begin()

    def _begin(self) -> None:
        """Begin a round."""
        self._begun = self.clock
        self._sequences = self._tokens = self._missed = 0
        self._largest = 1
        self._cost = self._products = self._cost_squares = self._squares = 0.0
