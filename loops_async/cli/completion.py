"""``loops completion``: scripts that complete commands and options by themselves, and ask `loops` only for ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, TypeAlias

import typer

from ._help import is_group, metavar, subcommands, takes_value, walk
from ._options import one_of
from ._shells import SCRIPTS, Node, Option, Value
from ._show import show_text

Shell: TypeAlias = Literal["bash", "zsh", "fish", "powershell"]

IDS: Final = {
    "RUN": "runs",
    "SAMPLER": "samplers",
    "DEPLOYMENT": "deployments",
    "CHECKPOINT": "checkpoints",
    "ID": "running",
}
"""What a value is, by its name in the help pages."""

FILES: Final = frozenset({"FILE", "INPUT", "OUTPUT", "DIRECTORY"})


def completion(
    context: typer.Context,
    shell: Annotated[Shell, typer.Argument(metavar=one_of(Shell), help="The shell to complete in.")],
) -> None:
    """Print a script that completes commands, options and ids.

    bash: put eval "$(loops completion bash)" into ~/.bashrc.

    zsh: put eval "$(loops completion zsh)" into ~/.zshrc.

    fish: run loops completion fish > ~/.config/fish/completions/loops.fish

    PowerShell: put loops completion powershell | Out-String | Invoke-Expression into $PROFILE.
    """
    show_text(SCRIPTS[shell](list(nodes(context.find_root().command))).rstrip("\n"))


def nodes(root: Any) -> Iterator[Node]:
    """Yield every command and group that a script completes."""
    for path, command in walk(root):
        given = [each for each in command.params if each.param_type_name == "argument"]
        yield Node(
            path,
            tuple(subcommands(command)),
            (*_options(command), Option(("--help",), "Show this page.", None)),
            _value(given[0]) if given and not is_group(command) else "",
        )


def _options(command: Any) -> Iterator[Option]:
    for each in command.params:
        if each.param_type_name == "option":
            yield Option(tuple(each.opts), each.help or "", _value(each) if takes_value(each) else None)


def _value(parameter: Any) -> Value:
    name = metavar(parameter).rstrip("…")
    if "|" in name:
        return f"words {name.replace('|', ' ')}"
    if name in FILES:
        return "files"
    return f"ids {IDS[name]}" if name in IDS else ""
