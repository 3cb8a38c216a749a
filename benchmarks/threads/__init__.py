"""`python -m benchmarks.threads`: OpenMP runtimes and waiting policies."""
