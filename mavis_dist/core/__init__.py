"""The mathematics: tensors in, tensors out. Independent of Ray, transformers, requests and config."""
