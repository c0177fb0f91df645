"""Adapters as values and as files: PEFT reads them, nothing is lost, and strangers are refused."""

from __future__ import annotations

import gc
import json
import weakref
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from loops_async.types import AdamParams, Datum
from loops_local.engine.base import Adapter, Engine, RefusedError, SampleOutcome, Sampler, Trainer
from loops_local.engine.pytorch import load

from .tools import gradient, job, logprobs, randomize, text, tokens, weights

BATCH = [text("a:", "zibble"), text("question:", "qux")]
ADAM = AdamParams(learning_rate=1e-2)


def _train(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.forward(BATCH, "cross_entropy", {}, backward=True)
        trainer.optim_step(ADAM)


def test_saved_gradients_are_bit_exact(engine: Engine, tmp_path: Path) -> None:
    trainer = engine.trainer(4, seed=3)
    _train(trainer, 2)
    trainer.forward(BATCH, "cross_entropy", {"skip_token_normalization": True}, backward=True)
    trainer.save(tmp_path)
    trainer.save_gradients(tmp_path)
    again = engine.trainer(2)
    again.load(tmp_path, optimizer=True)
    again.load_gradients(tmp_path)
    with pytest.raises(RefusedError, match="must be the same in all calls before an optim_step"):
        again.forward(BATCH, "cross_entropy", {}, backward=True)
    for one in (trainer, again):
        one.forward(BATCH[:1], "cross_entropy", {"skip_token_normalization": True}, backward=True)
    assert again.optim_step(ADAM) == trainer.optim_step(ADAM)
    mine, theirs = weights(again, tmp_path / "a"), weights(trainer, tmp_path / "b")
    assert all(mine[name].tobytes() == theirs[name].tobytes() for name in theirs)


# PEFT asks transformers for a property by its former name.
from_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@from_peft
def test_peft_reads_an_adapter(model_directory: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = load(str(model_directory), cache_dir=tmp_path).trainer(6, seed=1)
    randomize(trainer, tmp_path)
    trainer.adapter().save(tmp_path / "adapter")
    full = tokens(20, seed=3)
    datum = Datum(model_input=full[:-1], loss_fn_inputs={"target_tokens": full[1:]})
    [ours] = logprobs(trainer.forward([datum], "cross_entropy", {}, backward=False))
    base = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    with torch.no_grad():
        plain = base(torch.tensor([full[:-1]])).logits.log_softmax(-1)[0, range(19), full[1:]]
        oracle = PeftModel.from_pretrained(base, tmp_path / "adapter")
        theirs = oracle(torch.tensor([full[:-1]])).logits.log_softmax(-1)[0, range(19), full[1:]]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert float((theirs - plain).abs().max()) > 0.1


@from_peft
def test_we_read_what_peft_writes(model_directory: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=linear, init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "theirs")
    trainer = load(str(model_directory), cache_dir=tmp_path).trainer(8)
    trainer.load(tmp_path / "theirs", optimizer=False)
    full = tokens(20, seed=3)
    [ours] = logprobs(trainer.forward([Datum(model_input=full)], "cross_entropy", {}, backward=False))
    with torch.no_grad():
        expected = theirs(torch.tensor([full])).logits.log_softmax(-1)[0, range(19), full[1:]]
    np.testing.assert_allclose(ours[:-1], expected, atol=1e-5)
    trainer.save(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["lora_alpha"] == 7


def test_saving_and_loading_lose_nothing(engine: Engine, tmp_path: Path) -> None:
    trainer = engine.trainer(4, seed=0)
    _train(trainer, 3)
    trainer.save(tmp_path / "state")
    resumed = engine.trainer(2, seed=9)
    resumed.load(tmp_path / "state", optimizer=True)
    assert (resumed.rank, resumed.step) == (4, 3)
    for each in (trainer, resumed):
        _train(each, 2)
    trainer.save(tmp_path / "one")
    resumed.save(tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_loading_weights_alone_begins_the_optimizer_anew(engine: Engine, trainer: Trainer, tmp_path: Path) -> None:
    _train(trainer, 3)
    saved = weights(trainer, tmp_path)
    trainer.save(tmp_path / "state")
    trainer.forward(BATCH, "cross_entropy", {}, backward=True)
    trainer.load(tmp_path / "state", optimizer=False)
    assert trainer.step == 0
    assert all(np.array_equal(part, saved[name]) for name, part in weights(trainer, tmp_path).items())
    assert not any(part.any() for part in gradient(trainer, tmp_path).values())
    trainer.load(tmp_path / "state", optimizer=False)
    fresh = engine.trainer(4)
    trainer.adapter().save(tmp_path / "adapter only")
    fresh.load(tmp_path / "adapter only", optimizer=False)
    for each in (trainer, fresh):
        _train(each, 1)
    one, other = (weights(each, tmp_path) for each in (trainer, fresh))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_an_adapter_stays_as_it_was(engine: Engine, trainer: Trainer, sampler: Sampler, tmp_path: Path) -> None:
    """Version v is served while v + 1 trains."""
    _train(trainer, 2)

    def submit(adapter: Adapter) -> Future[SampleOutcome]:
        return sampler.submit(job("a:", adapter, seed=1, max_tokens=12))

    def tokens_of(future: Future[SampleOutcome]) -> list[int]:
        return future.result().completions[0].tokens

    version = trainer.adapter()
    before = tokens_of(submit(version))
    under_way = [submit(version) for _ in range(4)]
    _train(trainer, 3)
    under_way.append(submit(version))
    assert [tokens_of(future) for future in under_way] == [before] * 5
    assert tokens_of(submit(trainer.adapter())) != before
    version.save(tmp_path)
    assert tokens_of(submit(engine.load_adapter(tmp_path))) == before


def test_a_sampler_keeps_no_adapter_of_requests_that_have_ended(trainer: Trainer, sampler: Sampler) -> None:
    ended = []
    for _ in range(3):
        _train(trainer, 1)
        sampler.submit(job("a:", trainer.adapter(), max_tokens=3)).result(10)
        ended.append(weakref.ref(trainer.adapter()))
    _train(trainer, 1)
    sampler.submit(job("a:", max_tokens=3)).result(10)
    gc.collect()
    assert [adapter() for adapter in ended] == [None] * 3


def test_the_memory_of_an_adapter(trainer: Trainer, tmp_path: Path) -> None:
    assert trainer.adapter().nbytes == sum(part.nbytes for part in weights(trainer, tmp_path).values())


def _damage(directory: Path, **config: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def test_strangers_are_refused(engine: Engine, trainer: Trainer, tmp_path: Path) -> None:
    _train(trainer, 1)
    before = weights(trainer, tmp_path / "before")

    def refused(directory: Path, message: str, *, optimizer: bool = False) -> None:
        with pytest.raises(RefusedError, match=message):
            trainer.load(directory, optimizer=optimizer)
        now = weights(trainer, tmp_path / "now")
        assert trainer.step == 1
        assert all(np.array_equal(part, now[name]) for name, part in before.items())

    def saved(name: str) -> Path:
        trainer.save(tmp_path / name)
        return tmp_path / name

    refused(tmp_path / "nowhere", "cannot read the adapter's settings")
    _damage(other := saved("other"), base_model_name_or_path="Qwen/Qwen3-8B")
    refused(other, r"trained on 'Qwen/Qwen3-8B', not on this base model 'tiny'")
    with pytest.raises(RefusedError, match="not on this base model"):
        engine.load_adapter(other)
    _damage(dora := saved("dora"), use_dora=True)
    refused(dora, "only plain LoRA.*use_dora")
    _damage(broken := saved("broken"), r="four")
    refused(broken, "cannot read the adapter's settings")
    _damage(rank := saved("rank"), r=5)
    refused(rank, r"has shape \(4, 64\); the base model needs \(5, 64\)")
    (saved("empty") / "adapter_model.safetensors").write_bytes(b"")
    refused(tmp_path / "empty", "cannot read the adapter's weights")
    tensors = load_file(saved("part") / "adapter_model.safetensors")
    missing = tensors.pop(next(iter(tensors)))
    save_file({**tensors, "stranger": missing}, tmp_path / "part" / "adapter_model.safetensors")
    refused(tmp_path / "part", "does not have the layers of the base model")
    (saved("weights only") / "optimizer.safetensors").unlink()
    refused(tmp_path / "weights only", "no optimizer state", optimizer=True)


@pytest.mark.parametrize("rank", [1, 64])
def test_settings(engine: Engine, tmp_path: Path, rank: int) -> None:
    engine.trainer(rank).adapter().save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", rank, 32)
