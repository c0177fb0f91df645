"""One tiny model for all tests of the engine, on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loops_local.engine.base import Engine, Sampler, Trainer
from loops_local.engine.pytorch import load

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load("tiny", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def trainer(engine: Engine) -> Trainer:
    return engine.trainer(4, seed=0)


@pytest.fixture
def sampler(engine: Engine) -> Iterator[Sampler]:
    sampler = engine.sampler()
    yield sampler
    sampler.close()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as transformers saves it, whose plain copy is an oracle."""
    from tests.engine.tools import save_model

    return save_model("LlamaForCausalLM", tmp_path_factory.mktemp("llama"))
