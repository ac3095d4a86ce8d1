"""Readers of data beyond the official JSON files."""
