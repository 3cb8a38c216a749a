"""All environment variables of this project; no other module sets any. Import it before ray.

RAY_AUTH_MODE=token                    Ray's ports unpickle what they receive: every connection needs a token
RAY_TRAIN_V2_ENABLED=1                 the version of Ray Train that this project is written for
RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.5  how often Ray Train polls its workers; every report waits for a poll
RAY_USAGE_STATS_ENABLED=0              no usage statistics are sent
RAY_SERVE_PROXY_USE_GRPC=1             the proxy gets responses over gRPC: a chunk as a Ray object costs three times as
                                       much
RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0  the proxy reads them in its own event loop, without a second thread; for the
                                       replicas serve.app decides
RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0   CPU actors keep the GPU visibility of their machine
TOKENIZERS_PARALLELISM=false           threads of tokenizers do not survive a fork
OMP_WAIT_POLICY=PASSIVE                processes share cores: a thread that spins delays the one it waits for (steps
                                       were 10 times slower with two models on two cores)
GOMP_SPINCOUNT=1000                    but waking a thread costs as much as a small matrix product: a few microseconds
                                       of spinning save a fifth of a step
MAVIS_KEYS                             file of API keys that `jobs.serve` requires (default: no keys on loopback, else
                                       keys.json); "none": no keys on any address
MAVIS_API_KEY                          API key that `jobs.ask` sends to a service
MAVIS_CACHE                            folder of prepared models and compiled operators (default ~/.cache/mavis_dist)
RAY_ADDRESS                            cluster to join; without it a local one is started
"""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


def cache_folder() -> Path:
    """What is prepared once per machine, or once for all machines that share the folder."""
    return Path(os.environ.get("MAVIS_CACHE") or "~/.cache/mavis_dist").expanduser().absolute()
