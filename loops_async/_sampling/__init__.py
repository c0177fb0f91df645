"""The parts of sampling: answers, the queue, many prompts, tokenizers."""
