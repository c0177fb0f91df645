"""Answers without a socket, for tests of which each needs many clients."""

from __future__ import annotations

from inspect import signature
from typing import Any
from unittest.mock import Mock

import aiohttp
from aioresponses import aioresponses


class _Response(aiohttp.ClientResponse):
    def __init__(self, *args: Any, **others: Any) -> None:
        # aioresponses 0.7 does not know this argument of aiohttp 3.14. Bodies over 64 KiB still fail: they need a
        # real socket (`tests.support.scripted`).
        if "stream_writer" in signature(aiohttp.ClientResponse).parameters:
            others.setdefault("stream_writer", Mock(output_size=0))
        super().__init__(*args, **others)


class Stubbed(aioresponses):  # type: ignore[misc]  # it has no types
    """`aioresponses` that works with the aiohttp of today."""

    def add(self, *args: Any, **others: Any) -> None:
        others.setdefault("response_class", _Response)
        super().add(*args, **others)
