"""What replaces or extends a part of the model, one file each, chosen by a recipe field."""
