"""The APIs that agents speak: each translates its requests to one form, and the replies back."""

from __future__ import annotations

from .base import Answer, Dialect
from .chat import Chat
from .completions import Completions
from .messages import Messages
from .responses import Responses

__all__ = ["DIALECTS", "Answer", "Dialect"]

DIALECTS: tuple[Dialect, ...] = (Chat(), Completions(), Responses(), Messages())
