"""``loops local``."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec

import typer

from ._connection import FAILED, fail

app: typer.Typer = typer.Typer(no_args_is_help=True, help="The service on this machine.")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    short_help="Run the service on this machine until Ctrl-C.",
)
def serve(context: typer.Context) -> None:
    """Run the service on this machine; the options are those of `loops-local serve`."""
    if find_spec("loops_local") is None:
        fail("the service on this machine is not installed: pip install 'loops-async[local]'", FAILED)
    # As a program of its own: the client does not depend on the service.
    sys.argv = ["loops-local", "serve", *context.args]
    runpy.run_module("loops_local", run_name="__main__")
