"""``loops local``."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ._connection import FAILED, connection, fail
from ._help import App
from ._options import AsJson

app: App = App("The embedded service on this machine.")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    short_help="Run the embedded service until Ctrl-C.",
)
def serve(context: typer.Context) -> None:
    """Run the embedded service; the options are those of `loops-local serve`."""
    _run("serve", *context.args)


@app.command()
def dashboard(
    context: typer.Context,
    data_dir: Annotated[
        Path | None, typer.Option(help="The data directory of the service, unless it is the default one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the address of the dashboard of an embedded service that runs on this machine.

    It contains a token that opens the dashboard and nothing else.
    """
    url = connection(context).base_url
    _run(
        "dashboard",
        *([] if data_dir is None else ["--data-dir", str(data_dir)]),
        *([] if url is None else ["--url", url]),
        *(["--json"] if as_json else []),
    )


def _run(command: str, *arguments: str) -> None:
    if find_spec("loops_local") is None:
        fail("the embedded service is not installed: pip install 'loops-async[local]'", FAILED)
    # Run as a separate program, since the client does not depend on the service.
    sys.argv = ["loops-local", command, *arguments]
    runpy.run_module("loops_local", run_name="__main__")
