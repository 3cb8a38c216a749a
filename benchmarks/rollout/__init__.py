"""`python -m benchmarks.rollout`: growing trees."""
