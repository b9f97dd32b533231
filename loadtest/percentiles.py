"""Which percentiles are measured, and from how many requests."""

PERCENTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
MIN_REQUESTS_FOR_P99 = 100
"""Below it a p99 is only the slowest request seen."""
