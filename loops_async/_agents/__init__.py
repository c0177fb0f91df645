"""Agents as rollouts: the server that they speak to, the record of their calls, and the examples made of it."""
