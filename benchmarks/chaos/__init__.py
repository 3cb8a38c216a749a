"""`python -m benchmarks.chaos`: the service under faults."""
