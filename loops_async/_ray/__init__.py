"""Batches and rollouts on Ray: the only place that imports it."""
