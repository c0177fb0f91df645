"""HTTP: connections, time limits, repeated requests, bodies."""
