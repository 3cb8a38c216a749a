"""Shared storage: files appear whole, the marker is written last, and readers trust only the marker."""
