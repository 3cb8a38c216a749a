"""`python -m benchmarks.device`: decoding and training on a GPU."""
