"""Faults on demand: `Faults` within an embedded service, `FaultProxy` in front of any service."""

from .plan import (
    Answer,
    Delay,
    Drop,
    Duplicate,
    Fault,
    LoseAnswer,
    Refuse,
    Stall,
    Truncate,
    read_plan,
)
from .planned import Faults, PlannedFault
from .proxy import FaultCounts, FaultProxy, RuleCounts, proxy_in_thread

__all__ = [
    "Answer",
    "Delay",
    "Drop",
    "Duplicate",
    "Fault",
    "FaultCounts",
    "FaultProxy",
    "Faults",
    "LoseAnswer",
    "PlannedFault",
    "Refuse",
    "RuleCounts",
    "Stall",
    "Truncate",
    "proxy_in_thread",
    "read_plan",
]
