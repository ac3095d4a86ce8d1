"""Training on several processes, batches in pieces, saves in the background, and faster linear maps on some CPUs."""
