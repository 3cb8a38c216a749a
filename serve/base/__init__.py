"""The base replica process: one decode engine and what feeds it."""
