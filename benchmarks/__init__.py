"""Benchmarks: the library beside the limit and the published client, in one run. `make bench` runs them."""
