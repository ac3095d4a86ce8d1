"""The models that open_clip offers: their configurations, and their weights on the model hub."""
