"""``python -m loops_local.engine.pytorch.convert FILE.gguf DIRECTORY``: convert a GGUF model to float32 safetensors.

It runs in its own process, because reading GGUF takes 1 GB that is not needed afterwards, and prints progress bars.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(gguf: Path, directory: Path) -> None:
    """Write the model and the tokenizer of `gguf` into `directory`."""
    network = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # Otherwise the linear layers may stay quantized, and gradients could not pass through them.
        quantization_config=GgufConfig(dequantize=True),
    )
    network.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
