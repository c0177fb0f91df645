"""What the layer check refuses, and what it lets pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import check_layers


def problems_of(root: Path, path: str, source: str) -> list[str]:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    return check_layers.check(root)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("loops_async/errors.py", "from .types import Datum"),
        ("loops_async/types/inputs.py", "from .. import protocol"),
        ("loops_async/types/inputs.py", "def f():\n    import loops_async.client"),
        ("loops_async/sampling.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .client import X"),
        ("loops_async/client.py", "from loops_local import LocalService"),
        ("loops_async/client.py", "from . import ServiceClient"),
        ("loops_async/client.py", "import aiohttp"),
        ("loops_async/client.py", "def f():\n    import backoff"),
        ("loops_async/client.py", "import numpy as np"),
        ("loops_async/client.py", "if True:\n    import torch.nn"),
        ("loops_async/client.py", "import requests"),
        ("loops_async/surprise.py", ""),
        ("loops_sync/client.py", "import loops_local"),
        ("loops_local/_storage/store.py", "from loops_async._http.transport import Transport"),
        ("loops_local/_storage/store.py", "import torch"),
    ],
)
def test_refused(tmp_path: Path, path: str, source: str) -> None:
    assert len(problems_of(tmp_path, path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("loops_async/__init__.py", "from .client import *"),
        ("loops_async/types/inputs.py", "from ..errors import InputError\nfrom . import tensors"),
        ("loops_async/client.py", "import asyncio, anyio, msgspec\nfrom .errors import ConfigError"),
        ("loops_async/client.py", "def f():\n    import torch"),
        ("loops_async/client.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy"),
        ("loops_async/_http/transport.py", "from aiohttp import ClientSession"),
        ("loops_sync/client.py", "from loops_async.client import ServiceClient"),
        ("loops_local/_http/app.py", "from aiohttp import web\nfrom loops_async.types.inputs import Datum"),
        ("loops_local/engine/pytorch/lora.py", "import torch\nfrom ..base import Engine"),
    ],
)
def test_allowed(tmp_path: Path, path: str, source: str) -> None:
    assert problems_of(tmp_path, path, source) == []


def test_a_problem_names_file_and_line(tmp_path: Path) -> None:
    [problem] = problems_of(tmp_path, "loops_async/errors.py", "import sys\nfrom .types import Datum\n")
    assert problem.startswith("loops_async/errors.py:2: errors comes before types")
