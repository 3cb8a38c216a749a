"""Shared storage: files appear whole, a marker comes last, and readers believe only the marker."""
