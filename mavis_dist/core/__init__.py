"""The mathematics: tensors in, tensors out. Knows nothing of Ray, transformers, requests or config."""
