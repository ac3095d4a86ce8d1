"""Readers of data formats other than the official JSON files."""
