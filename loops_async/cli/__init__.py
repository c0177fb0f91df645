"""The command line ``loops``: runs, samplers, checkpoints and deployments without Python. Needs the ``cli`` extra."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

NAMES: Final = ("loops", "loops-async")
"""What it is installed as: a package of the vendor installs a `loops`, too."""

CALLBACK: Final = "__ids"
"""How completion scripts ask for ids; not in the tree of commands, which takes longer to import than it may take."""


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == [CALLBACK] and len(sys.argv) == 3:
        from ._ids import print_ids

        print_ids(sys.argv[2])
    try:
        from ._app import app, prepare
    except ModuleNotFoundError as missing:
        package = (missing.name or "").split(".")[0]
        if package not in ("rich", "typer"):
            raise
        sys.exit(f"loops: the command line needs {package}: pip install 'loops-async[cli]'")
    prepare()
    name = Path(sys.argv[0]).name
    app(prog_name=name if name in NAMES else NAMES[0])
