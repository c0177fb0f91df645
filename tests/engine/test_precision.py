"""The precision and the device of the base model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from loops_async.types import AdamParams, Datum
from loops_local import LocalService
from loops_local.engine.base import RefusedError
from loops_local.engine.pytorch import load
from loops_local.engine.pytorch.adapter import LoraAdapter
from loops_local.engine.pytorch.adapter_batch import AdapterBatch
from loops_local.engine.pytorch.kv_cache import KvCache, Prefill, Prefix
from loops_local.engine.pytorch.lora import ALPHA, fresh, using
from loops_local.engine.pytorch.models import load_base
from loops_local.engine.pytorch.products import Linear, has_onednn

from .tools import job, logprobs, randomize, text, tokens


def test_bfloat16_trains_and_samples_with_adapters_in_float32(tmp_path: Path) -> None:
    exact = load("tiny", cache_dir=tmp_path, device="cpu").trainer(4, seed=0)
    engine = load("tiny", cache_dir=tmp_path, dtype="bfloat16", device="cpu")
    trainer = engine.trainer(4, seed=0)
    for one in (exact, trainer):
        randomize(one, tmp_path)
    data = [text("a:", "zibble"), text("longer question:", "qux")]
    losses = []
    for _ in range(12):
        losses.append(trainer.forward(data, "cross_entropy", {}, backward=True).loss)
        trainer.optim_step(AdamParams(learning_rate=0.01))
    assert losses[-1] < losses[0] / 2
    for one in (exact, trainer):
        randomize(one, tmp_path)
    sampler = engine.sampler()
    [long, short] = [
        sampler.submit(job(tokens(n, seed=n), trainer.adapter(), n=2, max_tokens=20, seed=1)) for n in (300, 10)
    ]
    outcomes = [long.result(), short.result(60)]
    sampler.close()
    for n, outcome in zip((300, 10), outcomes, strict=True):
        for completion in outcome.completions:
            full = tokens(n, seed=n) + completion.tokens
            datum = Datum(model_input=full[:-1], loss_fn_inputs={"target_tokens": full[1:]})
            [expected] = logprobs(exact.forward([datum], "cross_entropy", {}, backward=False))
            error = np.abs(np.array(completion.logprobs) - expected[n - 1 :])
            assert 1e-5 < error.max() < 1, "rounded, and not more than that"


def test_a_step_runs_where_the_model_is(tmp_path: Path) -> None:
    """On torch's device without values, which refuses most operations with tensors of another device."""
    meta = torch.device("meta")
    base = load_base("tiny", cache_dir=tmp_path, device="cpu")
    adapter = LoraAdapter(fresh(base.shapes, 4, 0), 4, ALPHA, "tiny", base.shapes)
    base.network.to(meta)
    for module in base.network.modules():
        if isinstance(module, Linear):
            module.onednn = has_onednn(module.weight)
    base = replace(base, device=meta)
    prefill, kv_cache, batch = Prefill(40), KvCache[int](), AdapterBatch(base)
    with torch.inference_mode():
        for count in (24, 16):
            with using(batch.combine([adapter, None])):
                hidden = base.hidden(torch.zeros(2, count, dtype=torch.int64), **prefill.next(count))
        for row in range(4):
            prefix = Prefix.of(prefill.cache, row % 2, 40, hidden[row % 2, -1])
            kv_cache.add(row, prefix, shared=row > 1)
        rows, placement = kv_cache.next()
        with using(batch.combine([adapter, None, adapter, adapter])):
            following = base.hidden(torch.zeros(len(rows), 1, dtype=torch.int64), **placement)
        logits = base.logits(following[:, -1])
    assert logits.device == meta
    assert logits.shape == (4, base.info.vocab_size)


@pytest.mark.parametrize(("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps")])
def test_auto_is_a_gpu_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: bool, mps: bool, expected: str
) -> None:
    asked: list[str] = []

    def moved(module: torch.nn.Module, place: object) -> torch.nn.Module:
        if isinstance(place, torch.device):
            asked.append(place.type)
        return module

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    with pytest.raises(RefusedError):  # of the check of the model, since there is no such device here
        load("tiny", cache_dir=tmp_path)
    assert asked == [expected]


def test_unknown_devices_and_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="device: 'tpu9' cannot be used"):
        load("tiny", cache_dir=tmp_path, device="tpu9")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16; got 'float16'"):
        LocalService(dtype="float16")
