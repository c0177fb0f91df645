"""Real clients against the gateway, unmodified, each in an environment of its own: ``python -m tests.judges``."""
