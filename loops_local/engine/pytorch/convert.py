"""``python -m loops_local.engine.pytorch.convert FILE.gguf DIRECTORY``: a GGUF model as float32 safetensors.

A process of its own, because reading GGUF takes 1 GB that is not needed afterwards, and prints progress bars.
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
        # Else the linear layers may stay packed, and could not be trained through.
        quantization_config=GgufConfig(dequantize=True),
    )
    network.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
