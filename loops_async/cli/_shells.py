"""The completion scripts of four shells, each made from the tree of commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias

from msgspec import Struct

from . import CALLBACK, NAMES

Value: TypeAlias = str
"""How a value is completed: ``ids runs``, ``words DEBUG INFO``, ``files``, or the empty string for not at all."""


class Option(Struct, frozen=True):
    """An option: its names, its text, and its value, None for a flag."""

    names: tuple[str, ...]
    text: str
    value: Value | None


class Node(Struct, frozen=True):
    """A command or a group: its path, the commands below it with their texts, its options and its argument."""

    path: str
    commands: tuple[tuple[str, str], ...]
    options: tuple[Option, ...]
    argument: Value


def bash(nodes: Sequence[Node]) -> str:
    """Return the script for bash, which zsh reads, too."""
    places = "".join(
        f"    {_quoted(node.path)}) commands={_quoted(' '.join(name for name, _ in node.commands))} "
        f"options={_quoted(' '.join(_names(node)))} value={_quoted(node.argument)} ;;\n"
        for node in nodes
    )
    values = "".join(f"    {_quoted(place)}) value={_quoted(value)} ;;\n" for place, value in _values(nodes) if value)
    return _BASH.format(
        places=places, values=values, takes=" ".join(_takes_value(nodes)), names=" ".join(NAMES), callback=CALLBACK
    )


def zsh(nodes: Sequence[Node]) -> str:
    """Return the script for zsh."""
    return f"autoload -Uz compinit bashcompinit\nwhence compdef >/dev/null || compinit\nbashcompinit\n{bash(nodes)}"


def fish(nodes: Sequence[Node]) -> str:
    """Return the script for fish."""
    lines: list[str] = []
    for node in nodes:
        begin = f"complete -c {NAMES[0]} -n {_quoted(f'__loops_at {_quoted(node.path)}')}".replace("'\\''", '"')
        lines += [f"{begin} -a {name} -d {_quoted(text)}" for name, text in node.commands]
        lines += [f"{begin} {_fish_option(option)} -d {_quoted(option.text)}" for option in node.options]
        if node.argument:
            lines.append(f"{begin} {_fish_value(node.argument)}")
    paths = " ".join(_quoted(node.path) for node in nodes if node.path)
    return _FISH.format(
        lines="\n".join(lines),
        paths=paths,
        takes=" ".join(_takes_value(nodes)),
        loops=NAMES[0],
        other=NAMES[1],
        callback=CALLBACK,
    )


def _fish_option(option: Option) -> str:
    names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
    if option.value is None:
        return names
    return f"{names} -r {_fish_value(option.value)}"


def _fish_value(value: Value) -> str:
    kind, _, rest = value.partition(" ")
    words = {"ids": f"(__loops_ids {rest})", "words": rest}
    return "-F" if kind == "files" else f"-f -a {_quoted(words[kind])}" if kind in words else "-f"


def powershell(nodes: Sequence[Node]) -> str:
    """Return the script for PowerShell."""
    places = "".join(
        f"        '{node.path}' = @{{ commands = {_list(name for name, _ in node.commands)}; "
        f"options = {_list(_names(node))}; value = '{node.argument}' }}\n"
        for node in nodes
    )
    values = "".join(f"        '{place}' = '{value}'\n" for place, value in _values(nodes) if value)
    names = ", ".join(f"'{name}'" for name in NAMES)
    return _POWERSHELL.format(
        places=places, values=values, takes=_list(_takes_value(nodes)), names=names, callback=CALLBACK
    )


SCRIPTS: Final[dict[str, Callable[[Sequence[Node]], str]]] = {
    "bash": bash,
    "zsh": zsh,
    "fish": fish,
    "powershell": powershell,
}


def _names(node: Node) -> list[str]:
    return [name for option in node.options for name in option.names]


def _takes_value(nodes: Sequence[Node]) -> list[str]:
    """Return the names of all options with a value; no name is a flag elsewhere."""
    return sorted(
        {name for node in nodes for option in node.options if option.value is not None for name in option.names}
    )


def _values(nodes: Sequence[Node]) -> list[tuple[str, Value]]:
    """Return ``path option`` and how its value is completed."""
    return [
        (f"{node.path} {name}".lstrip(), option.value)
        for node in nodes
        for option in node.options
        if option.value is not None
        for name in option.names
    ]


def _quoted(text: str) -> str:
    escaped = text.replace("'", "'\\''")
    return f"'{escaped}'"


def _list(words: Iterable[str]) -> str:
    quoted = ", ".join(f"'{word}'" for word in words)
    return f"@({quoted})"


_BASH: Final = r"""_loops_at() {{
    case "$1" in
{places}    esac
}}
_loops_value() {{
    value=""
    case "$1" in
{values}    esac
}}
_loops_match() {{
    local word
    while IFS= read -r word; do
        case "$word" in "") ;; "$1"*) COMPREPLY+=("$word") ;; esac
    done
}}
_loops_complete() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" where="" pending="" index=1 word commands options value url
    local takes="{takes}"
    COMPREPLY=()
    _loops_at ""
    while [ "$index" -lt "$COMP_CWORD" ]; do
        word="${{COMP_WORDS[index]}}"
        if [ -n "$pending" ]; then
            [ "$word" = "=" ] || pending=""
        elif [ -n "$word" ]; then
            case " $takes " in
            *" $word "*) pending="$word" ;;
            *)
                case " $commands " in
                *" $word "*) where="${{where:+$where }}$word" && _loops_at "$where" ;;
                esac
                ;;
            esac
        fi
        index=$((index + 1))
    done
    [ "$current" = "=" ] && current=""
    if [ -n "$pending" ]; then
        _loops_value "${{where:+$where }}$pending"
    elif [ "${{current#-}}" != "$current" ]; then
        value="words $options"
    elif [ -n "$commands" ]; then
        value="words $commands"
    fi
    case "$value" in
    "ids "*)
        url="$LOOPS_BASE_URL"
        case "$COMP_LINE" in *" --base-url "*) url="${{COMP_LINE#* --base-url }}" && url="${{url%% *}}" ;; esac
        _loops_match "$current" < <(LOOPS_BASE_URL="$url" "$1" {callback} "${{value#ids }}" 2>/dev/null </dev/null)
        ;;
    "words "*) _loops_match "$current" < <(printf '%s\n' ${{value#words }} | tr ' ' '\n') ;;
    files) while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -f -- "$current") ;;
    esac
}}
complete -F _loops_complete {names}
"""

_FISH: Final = r"""function __loops_at
    set -l where
    set -l skip no
    for word in (commandline -opc)[2..-1]
        if test $skip = yes
            set skip no
        else if contains -- $word {takes}
            set skip yes
        else if contains -- (string trim -- "$where $word") {paths}
            set where (string trim -- "$where $word")
        end
    end
    test "$where" = "$argv[1]"
end
function __loops_ids
    set -l words (commandline -opc)
    command $words[1] {callback} $argv[1] 2>/dev/null </dev/null
end
complete -c {loops} -f
{lines}
complete -c {other} -w {loops}
"""

_POWERSHELL: Final = r"""Register-ArgumentCompleter -Native -CommandName {names} -ScriptBlock {{
    param($wordToComplete, $commandAst, $cursorPosition)
    $takes = {takes}
    $places = @{{
{places}    }}
    $values = @{{
{values}    }}
    $words = @($commandAst.CommandElements | Where-Object {{ $_.Extent.EndOffset -lt $cursorPosition }} |
            ForEach-Object {{ $_.ToString() }})
    $where = ''
    $pending = ''
    foreach ($word in $words | Select-Object -Skip 1) {{
        if ($pending) {{ $pending = '' }}
        elseif ($takes -contains $word) {{ $pending = $word }}
        elseif ($places[$where].commands -contains $word) {{ $where = "$where $word".Trim() }}
    }}
    $value = $places[$where].value
    if ($pending) {{ $value = $values["$where $pending".Trim()] }}
    elseif ($wordToComplete.StartsWith('-')) {{ $value = "words $($places[$where].options)" }}
    elseif ($places[$where].commands) {{ $value = "words $($places[$where].commands)" }}
    $kind, $rest = "$value" -split ' ', 2
    if ($kind -eq 'words') {{ $found = $rest -split ' ' }}
    elseif ($kind -eq 'ids') {{ $found = & $words[0] {callback} $rest 2>$null }}
    else {{ $found = @() }}
    $found | Where-Object {{ $_ -like "$wordToComplete*" }} |
        ForEach-Object {{ [System.Management.Automation.CompletionResult]::new($_, $_, 'ParameterValue', $_) }}
}}
"""
