"""``loops local``."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec

import typer

from ._connection import FAILED, fail
from ._help import App

app: App = App("The embedded service on this machine.")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    short_help="Run the embedded service until Ctrl-C.",
)
def serve(context: typer.Context) -> None:
    """Run the embedded service; the options are those of `loops-local serve`."""
    if find_spec("loops_local") is None:
        fail("the embedded service is not installed: pip install 'loops-async[local]'", FAILED)
    # Run as a separate program, since the client does not depend on the service.
    sys.argv = ["loops-local", "serve", *context.args]
    runpy.run_module("loops_local", run_name="__main__")
