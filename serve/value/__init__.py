"""The value replica process: one objective's value models."""
