"""`python -m benchmarks.steerability`: preferences given as sentences."""
