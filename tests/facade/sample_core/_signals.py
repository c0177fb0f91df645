"""Ctrl-C at a moment of our choice."""

from __future__ import annotations

import signal
import threading


def interrupt() -> None:
    """Interrupt the main thread, whichever thread calls."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
