"""Training on several processes, batches in pieces, and faster linear maps on some CPUs."""
