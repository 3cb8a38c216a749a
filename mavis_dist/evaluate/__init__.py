"""Measuring what the weights do on unseen prompts, and saying so."""
