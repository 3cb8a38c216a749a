"""`python -m benchmarks.decode`: speed and quality of the decoder."""
