"""Let schemathesis call the embedded service as its OpenAPI document says, in an environment of its own.

Exits with 1 when the service answers 5xx to anything, or otherwise than its document says.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import urllib.request
from typing import Final
from urllib.error import HTTPError

from loops_local import serve_in_thread

from .environments import installed

TOOL: Final = "schemathesis==4.32.5"
PHASES: Final = "examples,coverage,fuzzing,stateful"
CHECKS: Final = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main() -> int:
    """Run it; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.schema", description=__doc__)
    parser.add_argument("--examples", type=int, default=50, help="for each operation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="default: a new one")
    parser.add_argument("--phases", default=PHASES, help="of schemathesis (default: %(default)s)")
    asked = parser.parse_args()
    with serve_in_thread(engine="echo", provisioning_seconds=0.0, poll_hold_seconds=0.1) as local:
        document = f"{local.base_url}/openapi.json"
        authorization = f"Bearer {local.api_key}"
        if not _is_there(document, authorization):
            print("SCHEMATHESIS LEFT OUT: the embedded service has no /openapi.json")
            return 0
        environment = installed(TOOL)
        if environment is None:
            return 0
        print(
            f"schemathesis: seed {asked.seed}; again with: python -m tests.chaos.schema --seed {asked.seed}", flush=True
        )
        with tempfile.TemporaryDirectory() as directory:  # it writes where it runs
            return subprocess.run(
                [
                    *(
                        environment / "bin" / "schemathesis",
                        "run",
                        document,
                        "--header",
                        f"Authorization: {authorization}",
                    ),
                    *("--checks", CHECKS, "--max-examples", str(asked.examples), "--seed", str(asked.seed)),
                    *("--phases", asked.phases),
                    *("--request-timeout", "20", "--no-color"),
                ],
                cwd=directory,
                env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
                check=False,
            ).returncode


def _is_there(url: str, authorization: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": authorization})) as answer:
            return bool(answer.status == 200)
    except HTTPError:
        return False


if __name__ == "__main__":
    sys.exit(main())
