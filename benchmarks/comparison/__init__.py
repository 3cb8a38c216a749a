"""The trained alternatives to value-guided decoding: policies per objective or preference, and their mixtures."""
