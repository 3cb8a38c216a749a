"""`python -m benchmarks.study`: the share of the limit of steering, of a run and variants of its training."""
