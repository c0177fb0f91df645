"""Checkpoints: listing them and their files, and downloading these."""
