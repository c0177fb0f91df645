"""Commands and their help pages, which cut no word and show a value only where an option takes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from ._exit_codes import FAILED, INTERRUPTED, REFUSED
from ._show import LONGEST_LINE, columns_of_terminal, complain, drop_output, leave_closed_pipe, wrapped

F = TypeVar("F", bound=Callable[..., Any])

NARROW: Final = 60
"""In fewer columns than this, the text of an option begins on a line of its own."""

_JOINT: Final = "\xa0"
"""A space that does not end a line."""

Page: TypeAlias = Sequence[tuple[str, str]]
"""What is described, and its description."""


class App(typer.Typer):
    """A group of commands."""

    def __init__(self, text: str, epilog: str | None = None) -> None:
        super().__init__(
            cls=Group,
            help=text,
            epilog=epilog,
            no_args_is_help=True,
            add_completion=False,
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
        )

    def command(self, name: str | None = None, **options: Any) -> Callable[[F], F]:
        """Add a command."""
        return super().command(name, cls=Command, **options)


class Command(TyperCommand):
    """A command with our help page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        formatter.write(page(self, ctx.command_path))


class Group(TyperGroup):
    """A group of commands with our help page; as the root, it prints usage errors as all others are printed."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        formatter.write(page(self, ctx.command_path))

    def invoke(self, ctx: Any) -> Any:
        """Run a command of the group."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            leave_closed_pipe()

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.Abort:
            complain("interrupted")
            code = INTERRUPTED
        except OSError as error:  # those of a command's work end in `run`
            drop_output()
            complain(f"cannot write the output: {error}.")
            code = FAILED
        except Exception as error:
            # Usage errors, whose classes have no name that all versions of Typer share.
            if not hasattr(error, "format_message"):
                raise
            code = _show_usage_error(error)
        if standalone_mode:
            raise SystemExit(code or 0)
        return code


def _show_usage_error(error: Any) -> int:
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(message, err=True)
        return REFUSED
    sentence = " ".join(message.split()).removeprefix("Invalid value: ").replace(": Value error, ", ": ")
    full_stop = "" if sentence.endswith((".", "?", "!")) else "."
    path = error.ctx.command_path if error.ctx else "loops"
    complain(f"{sentence}{full_stop} See `{path} --help`.")
    return REFUSED


def page(command: Any, path: str, width: int | None = None) -> str:
    """Return the help page of a command or a group, in lines of at most `width` characters where words allow it."""
    width = min(width or columns_of_terminal() or LONGEST_LINE, LONGEST_LINE)
    usage = f"Usage: {path} {' '.join(usage_of(command))}"
    parts = [_wrapped(usage, width, later="    "), *(_wrapped(text, width) for text in _paragraphs(command.help))]
    sections = {"Arguments": arguments(command), "Commands": subcommands(command), "Options": options(command)}
    parts += [f"{title}:\n{_section(rows, width)}" for title, rows in sections.items() if rows]
    parts += [_wrapped(text, width) for text in _paragraphs(command.epilog)]
    return "\n\n".join(parts) + "\n"


def usage_of(command: Any) -> list[str]:
    """Return what follows a command: the names of its arguments, in brackets where they may be left out."""
    given = ["[OPTIONS]"] if options(command) else []
    named = [_display(each) if each.required else f"[{_display(each)}]" for each in _parameters(command, "argument")]
    return [*given, *named, *(["COMMAND"] if is_group(command) else [])]


def arguments(command: Any) -> Page:
    """Return the arguments of a command that have a description."""
    return [(_display(each), _described(each)) for each in _parameters(command, "argument") if each.help]


def options(command: Any) -> Page:
    """Return the options of a command."""
    is_passed_on = command.context_settings.get("help_option_names") == []
    ours = [(_display(each), _described(each)) for each in _parameters(command, "option")]
    return ours if is_passed_on else [*ours, ("--help", "Show this page.")]


def subcommands(command: Any) -> Page:
    """Return the commands of a group."""
    return [(name, summary(each)) for name, each in _visible(command)]


def summary(command: Any) -> str:
    """Return what a command does, in a sentence or two."""
    return _paragraphs(command.help)[0] if command.help else ""


def is_group(command: Any) -> bool:
    """Whether a command is a group of commands."""
    return hasattr(command, "commands")


def walk(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each command and group with its path, e.g. ``runs create``; the root's is empty."""
    yield path, command
    for name, each in _visible(command):
        yield from walk(each, f"{path} {name}".lstrip())


def takes_value(option: Any) -> bool:
    """Whether an option is followed by a value."""
    return not option.is_flag


def metavar(parameter: Any) -> str:
    """Return the name of a value as it is shown, by default the last word of its option's name."""
    longest: str = max(parameter.opts, key=len)
    shown: str = parameter.metavar or longest.rpartition("-")[2].upper()
    return shown


def _visible(command: Any) -> list[tuple[str, Any]]:
    found = getattr(command, "commands", {})
    return [(name, each) for name, each in found.items() if not each.hidden]


def _parameters(command: Any, kind: str) -> list[Any]:
    return [each for each in command.params if each.param_type_name == kind and not getattr(each, "hidden", False)]


def _display(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return metavar(parameter)
    names = ", ".join(sorted(parameter.opts, key=len))
    return f"{names} {metavar(parameter)}" if takes_value(parameter) else names


def _described(parameter: Any) -> str:
    """Return the text of a parameter and its default, where that says something."""
    text: str = parameter.help or ""
    default = parameter.default
    if isinstance(default, bool) or not isinstance(default, str | int | float):
        return text
    shown = default if isinstance(default, str) else f"{default:g}"
    return f"{text} [default:{_JOINT}{shown}]".lstrip()


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(each.split()) for each in (text or "").split("\n\n") if each.strip()]


def _section(rows: Page, width: int) -> str:
    if width < NARROW:
        return "\n".join(f"  {name}\n{_wrapped(text, width, first='      ', later='      ')}" for name, text in rows)
    column = max(len(name) for name, _ in rows) + 4
    return "\n".join(
        _wrapped(text, width, first=f"  {name}".ljust(column), later=" " * column).rstrip() for name, text in rows
    )


def _wrapped(text: str, width: int, *, first: str = "", later: str = "") -> str:
    return wrapped(text, width, first=first, later=later).replace(_JOINT, " ") or first
