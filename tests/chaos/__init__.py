"""What must hold under faults, run for as long as asked: `make chaos`, `make fuzz` and `make soak`.

These are programs with a clock and a seed: each run draws a new seed and prints it. pytest collects only the test
of their judgement.
"""
