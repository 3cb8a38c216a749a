"""Operators in C++, compiled on first use."""
