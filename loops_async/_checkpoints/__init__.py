"""Downloading checkpoints."""
