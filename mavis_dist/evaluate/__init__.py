"""Evaluation: the gate, the sweep over weights on unseen prompts, and the report."""
