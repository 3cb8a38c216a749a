"""Steering language models at inference time towards several objectives, on Ray."""
