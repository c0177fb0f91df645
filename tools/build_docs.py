"""Build the documentation site into a folder, without a network; every warning is an error."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parent.parent


def build(out: Path) -> int:
    """Build into an empty folder, or in the place of an earlier site; return the exit code."""
    if (out / "objects.inv").exists():
        shutil.rmtree(out)  # pages that have gone would stay
    with tempfile.TemporaryDirectory() as doctrees:
        options = ["--quiet", "--fail-on-warning", "--fresh-env", "--write-all", "--builder", "html"]
        return 1 if build_main([*options, "--doctree-dir", doctrees, str(ROOT / "docs"), str(out)]) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder of the site")
    return build(parser.parse_args().out)


if __name__ == "__main__":
    sys.exit(main())
