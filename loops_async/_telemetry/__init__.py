"""OpenTelemetry: a span for each call, its requests below it, and metrics. Only `setup` may be imported without it."""
