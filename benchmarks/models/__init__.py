"""`python -m benchmarks.models`: every architecture of transformers, tiny, through all that is done with models."""
