"""`python -m benchmarks.training`: training on packed trees."""
