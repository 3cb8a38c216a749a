"""Models: loading them, giving them heads, and keeping their key-value caches. No Ray, no config objects."""
