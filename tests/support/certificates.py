"""Certificates that no authority has signed."""

from __future__ import annotations

import subprocess
from pathlib import Path


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for loops.test and 127.0.0.1, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    names = "subjectAltName=DNS:loops.test,IP:127.0.0.1"
    request = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=loops.test -addext {names}"
    subprocess.run(["openssl", *request.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key
