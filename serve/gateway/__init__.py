"""The gateway process: HTTP in, requests to base replicas out."""
