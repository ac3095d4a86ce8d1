"""Replacements and extensions of parts of the model, one per file, each selected by a recipe field."""
