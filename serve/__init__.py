"""Ray Serve wiring: an OpenAI-compatible gateway, base replicas with the decode engine, and value replicas.

Inside this folder write `from ray import serve` and `from serve.x import y`, never `import serve`.
"""

from mavis_dist import environment as environment  # ray reads some of these variables when it is imported
