"""The page on the command line shows the tables that the code has."""

from __future__ import annotations

import re

import typer.main

from loops_async.cli._app import app
from loops_async.cli._exit_codes import ENDINGS
from loops_async.cli._help import is_group, walk
from tools import cli_tables

PAGE = cli_tables.PAGE.read_text()


def test_the_page_is_up_to_date() -> None:
    assert cli_tables.written(PAGE) == PAGE, "run python tools/cli_tables.py"


def test_every_command_has_a_section_with_its_options() -> None:
    found = dict(re.findall(r"^### `loops (.+?)`\n(.*?)(?=^### |\Z)", cli_tables.commands(), re.DOTALL | re.MULTILINE))
    commands = {path: command for path, command in walk(typer.main.get_command(app)) if not is_group(command)}
    assert found.keys() == commands.keys()
    for path, command in commands.items():
        for each in command.params:
            if each.param_type_name == "option":
                assert all(re.search(rf"`.*{name}\b", found[path]) for name in each.opts), path


def test_every_command_is_in_the_overview() -> None:
    overview = PAGE.split("## Commands\n")[1].split("## ")[0]
    for path, command in walk(typer.main.get_command(app)):
        if not is_group(command):
            group, _, name = path.rpartition(" ")
            assert re.search(rf"`loops {group}\b.*`{name}`|`loops {path}\b", overview), path


def test_every_exit_code_has_a_line() -> None:
    assert re.findall(r"^\| (\d+) \|", cli_tables.exit_codes(), re.MULTILINE) == [str(each.code) for each in ENDINGS]
