"""`python -m benchmarks.steerability`: steering by preferences."""
