"""Rollouts beside training: episodes, groups, the bound of their age, and the stream of batches."""
