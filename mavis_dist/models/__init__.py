"""Models: loading, value heads, key-value caches. No Ray, no config objects."""
