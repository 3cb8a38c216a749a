"""`python -m benchmarks.decode`: the decoder."""
