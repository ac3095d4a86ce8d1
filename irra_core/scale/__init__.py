"""Several processes, batches in pieces, and faster arithmetic on some CPUs."""
