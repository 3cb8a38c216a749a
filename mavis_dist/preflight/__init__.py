"""Everything of a config that can fail, tried before anything expensive starts."""
