"""Engines for services under test."""

from __future__ import annotations

from loops_local import RefusedError
from loops_local.engine.echo import EchoEngine


def echo_unless_broken(name: str) -> EchoEngine:
    """Load the echo engine under any name but ``broken``, whose provisioning fails."""
    if name == "broken":
        raise RefusedError("its weights are corrupt")
    return EchoEngine(name)
