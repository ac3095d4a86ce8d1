"""Approximate search, Milvus and re-ranking behind a gallery."""
