"""Weights that lie on a model hub."""
