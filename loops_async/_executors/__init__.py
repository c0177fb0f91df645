"""Processes that run functions and whole rollouts, and the one law for what comes of them."""
