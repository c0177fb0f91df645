"""Rollouts beside training: the parts of an asynchronous loop of reinforcement learning.

- `Episode`: one rollout, of one or many turns, as tokens with what training needs to know of each.
- `group_advantages`: how much better each member of a group is than the others.
- `StalenessGate`: bounds how far rollouts run ahead of training; for loops of your own.
- `FailurePolicy`: which failures are tolerated. `RolloutState`: where to continue.
"""

from ._rollouts.advantages import AdvantageMethod, group_advantages
from ._rollouts.episode import Episode
from ._rollouts.failures import FailurePolicy
from ._rollouts.gate import GateState, StalenessGate, Ticket
from ._rollouts.state import RolloutState

__all__ = [
    "AdvantageMethod",
    "Episode",
    "FailurePolicy",
    "GateState",
    "RolloutState",
    "StalenessGate",
    "Ticket",
    "group_advantages",
]
