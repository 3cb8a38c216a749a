"""`python -m benchmarks.serving`: the service under load."""
