"""The command line ``loops``: runs, samplers, checkpoints and deployments without Python. Needs the ``cli`` extra.

Exit codes: 0 success, 1 the service or this machine failed, 2 invalid request, 3 API key rejected, 4 not found,
5 provisioning failed or not ready in time, 6 service not reached, 130 interrupted.
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
