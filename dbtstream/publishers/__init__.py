"""Where events go. Each publisher is one file and knows nothing of the others."""
