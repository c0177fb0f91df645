"""The engine's threads share the cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loops_local.engine.pytorch import cores


def test_each_gets_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_all_cores", 4)

    def here() -> int:
        cores.adjust()
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:

        def on(thread: ThreadPoolExecutor, what: Callable[[], object]) -> object:
            return thread.submit(what).result()

        first, second = cores.working(), cores.working()
        on(one, first.__enter__)
        assert on(one, here) == 4
        on(other, second.__enter__)
        assert (on(one, here), on(other, here)) == (2, 2)
        on(one, lambda: first.__exit__(None, None, None))
        assert on(other, here) == 4
        on(other, lambda: second.__exit__(None, None, None))
    torch.set_num_threads(1)
