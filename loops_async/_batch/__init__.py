"""Batches: rows in, records out, in files or wherever a caller keeps them."""
