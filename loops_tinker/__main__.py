"""Runs a script that was written for `tinker`, unchanged.

python -m loops_tinker run script.py --its-own arguments
python -m loops_tinker run -m package.module --its-own arguments
PYTHONPATH=$(python -m loops_tinker path) python script.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final, NoReturn

PATH: Final = Path(__file__).parent / "_path"
"""The folder in which ``import tinker`` finds this package."""


def main() -> NoReturn:
    """Do what the command line says."""
    match sys.argv[1:]:
        case ["path"]:
            print(PATH)  # noqa: T201 - what the command is for
            sys.exit()
        case ["run", *arguments] if arguments:
            _run(arguments)
        case _:
            sys.exit((__doc__ or "").strip())


def _run(arguments: list[str]) -> NoReturn:
    """Become Python with these arguments; where a process cannot become another, start it and wait."""
    # In the environment, so that processes that the script starts find it, too.
    paths = [str(PATH), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *arguments]
    if sys.platform == "win32":
        sys.exit(subprocess.call(command, env=environment))  # noqa: S603 - the user's own command
    os.execve(sys.executable, command, environment)  # noqa: S606 - as above


if __name__ == "__main__":
    main()
