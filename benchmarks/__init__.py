"""Benchmarks that compare the library with the limit and the published client. `make bench` runs them."""
