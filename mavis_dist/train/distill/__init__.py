"""Distillation of several value models into one, with a head that predicts the values of candidates."""
