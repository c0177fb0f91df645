"""Options and arguments that several commands have, and the checks of their values before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Final, TypeAlias, TypeVar, get_args

import typer

from ..errors import InputError
from ..protocol import CheckpointKind, CheckpointUri

T = TypeVar("T")

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(text: str) -> float:
    """Return the seconds of a duration, e.g. ``90s``, ``30m``, ``2h`` or ``1d``."""
    found = _DURATION.fullmatch(text)
    if found is None or not float(found[1]):
        raise typer.BadParameter(f"expected a duration, e.g. 90s, 30m, 2h or 1d; got {text!r}")
    return float(found[1]) * _SECONDS[found[2]]


def at_most(longest: str) -> Callable[[str], str]:
    """Return a check that a duration is not longer than `longest`."""

    def check(text: str) -> str:
        if duration(text) > duration(longest):
            raise typer.BadParameter(f"must be at most {longest}; got {text!r}")
        return text

    return check


def text(most: int = 10_000) -> Callable[[T], T]:
    """Return a check that a text, if it is given, has 1 to `most` characters."""

    def check(value: T) -> T:
        if isinstance(value, str) and not 1 <= len(value) <= most:
            raise typer.BadParameter(f"must have 1 to {most} characters; got {len(value)}")
        return value

    return check


def checkpoint_path(kind: CheckpointKind | None = None) -> Callable[[T], T]:
    """Return a check that a value, if it is given, is the ``bt://`` path of a checkpoint, of this kind if any."""

    def check(value: T) -> T:
        if value is not None:
            _check_path(value, kind)
        return value

    return check


def id_or_path(value: str) -> str:
    """Check that what begins like the ``bt://`` path of a checkpoint is one; anything else is an id."""
    if value.startswith("bt:"):
        _check_path(value, None)
    return value


def ids_or_paths(values: list[str]) -> list[str]:
    """Check several of them."""
    return [id_or_path(value) for value in values]


def one_of(choices: Any) -> str:
    """Return how the values of a `Literal` are shown."""
    return "|".join(get_args(choices))


def _check_path(value: Any, kind: CheckpointKind | None) -> None:
    try:
        CheckpointUri.parse(value, kind=kind)
    except InputError as error:
        raise typer.BadParameter(str(error).partition(": ")[2]) from None


AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Print only ids, one a line.")]
Everyone: TypeAlias = Annotated[bool, typer.Option("--all", help="List those of the whole organization.")]
ReadyTimeout: TypeAlias = Annotated[
    float, typer.Option(help="How long to wait until it is ready.", min=0.1, metavar="SECONDS")
]
Keep: TypeAlias = Annotated[bool, typer.Option("--keep", help="Do not deactivate it on failure or Ctrl-C.")]
NoWait: TypeAlias = Annotated[bool, typer.Option("--no-wait", help="Do not wait until it is ready.")]
Spot: TypeAlias = Annotated[bool, typer.Option("--spot", help="Use cheaper machines that may be preempted.")]

RunId: TypeAlias = Annotated[str, typer.Argument(metavar="RUN", help="The id of a run.")]
RunIds: TypeAlias = Annotated[list[str], typer.Argument(metavar="RUN…", help="Ids of runs.")]
SamplerId: TypeAlias = Annotated[str, typer.Argument(metavar="SAMPLER", help="The id of a sampler.")]
SamplerIds: TypeAlias = Annotated[list[str], typer.Argument(metavar="SAMPLER…", help="Ids of samplers.")]
DeploymentId: TypeAlias = Annotated[str, typer.Argument(metavar="DEPLOYMENT", help="The id of a deployment.")]
DeploymentIds: TypeAlias = Annotated[list[str], typer.Argument(metavar="DEPLOYMENT…", help="Ids of deployments.")]
CheckpointId: TypeAlias = Annotated[
    str,
    typer.Argument(metavar="CHECKPOINT", help="The id of a checkpoint, or its bt:// path.", callback=id_or_path),
]
CheckpointIds: TypeAlias = Annotated[
    list[str],
    typer.Argument(metavar="CHECKPOINT…", help="Ids or bt:// paths of checkpoints.", callback=ids_or_paths),
]
