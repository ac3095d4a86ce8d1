"""Several processes, and faster arithmetic on some CPUs."""
