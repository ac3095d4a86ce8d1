"""Storage and search of a gallery's photos: memory, folders, HNSW graphs, Milvus, re-ranking."""
