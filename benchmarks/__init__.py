"""How fast and how exact the decoder is, measured: `python -m benchmarks.decode --help`."""
