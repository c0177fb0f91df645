"""The command line ``loops``: the daily work with runs, samplers, checkpoints and deployments. Needs the ``cli`` extra.

Exit codes: 0 done, 1 the service or this machine failed, 2 the request was wrong, 3 the key was refused, 4 there is no
such thing, 5 it did not come up, 6 the service was not reached, 130 interrupted.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from ._app import app, prepare
    except ModuleNotFoundError as missing:
        package = (missing.name or "").split(".")[0]
        if package not in ("rich", "typer"):
            raise
        sys.exit(f"loops: the command line needs {package}: pip install 'loops-async[cli]'")
    prepare()
    app(prog_name="loops")
