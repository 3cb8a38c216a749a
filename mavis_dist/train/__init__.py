"""Training of value models: DeepSpeed workers under Ray Train, one group per objective."""
