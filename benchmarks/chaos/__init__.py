"""`python -m benchmarks.chaos`: the service under faults, malformed requests and long load."""
