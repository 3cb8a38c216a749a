"""A base model that several processes share."""
