"""HTTP: connections, time limits, retries, bodies."""
