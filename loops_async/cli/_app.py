"""The tree of commands."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import typer

from .._version import __version__
from . import checkpoints, deployments, journal, local, runs, samplers
from ._connection import Connection, prepare
from ._exit_codes import in_one_sentence
from ._help import App
from ._options import one_of
from .capabilities import capabilities
from .completion import completion
from .doctor import doctor
from .running import down, ps
from .sample import sample
from .top import top

__all__ = ["app", "prepare"]

AuthScheme: TypeAlias = Literal["Bearer", "Api-Key"]

app = App(
    "Baseten Loops: LoRA training runs, samplers and checkpoints.",
    epilog=f"The API key is read from BASETEN_API_KEY, or asked for in a terminal.\n\n{in_one_sentence()}",
)
app.add_typer(runs.app, name="runs")
app.add_typer(samplers.app, name="samplers")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(deployments.app, name="deployments")
app.command()(ps)
app.command()(top)
app.command()(down)
app.command()(sample)
app.command()(capabilities)
app.command()(doctor)
app.command()(completion)
app.add_typer(journal.app, name="journal")
app.add_typer(local.app, name="local")


def _show_version(is_given: bool) -> None:
    if is_given:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="The service; default LOOPS_BASE_URL, else the hosted one.")
    ] = None,
    team: Annotated[
        str | None, typer.Option(help="The name or id of a team; default LOOPS_TEAM, else your own.")
    ] = None,
    auth_scheme: Annotated[
        AuthScheme, typer.Option(metavar=one_of(AuthScheme), help="How the key is sent.")
    ] = "Bearer",
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Baseten Loops: LoRA training runs, samplers and checkpoints."""
    context.obj = Connection(base_url=base_url, team=team, auth_scheme=auth_scheme)
