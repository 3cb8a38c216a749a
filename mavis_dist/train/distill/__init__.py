"""Distillation of several value models into one, with a student that predicts candidates."""
