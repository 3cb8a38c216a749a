"""`python -m benchmarks.study`: iterations and variants of the training."""
