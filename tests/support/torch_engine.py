"""What the torch engine needs before it starts."""

from __future__ import annotations

from importlib import import_module


def import_it_here() -> None:
    """Import all that the engine will import, in the thread that runs the tests.

    Python 3.11 cannot parse source in two threads at once ("AST constructor recursion depth mismatch"): torch parses
    its own when it is imported, and pytest that of the modules whose assertions it rewrites.

    The tiny model computes in one thread: on a busy machine, several wait for each other ten times as long.
    """
    import_module("torch").set_num_threads(1)  # before the engine reads it
    for name in ("torch._dynamo", "loops_local.engine.pytorch"):
        import_module(name)
