"""Environment variables of this project: all of them, set here and nowhere else. Import it before ray.

RAY_AUTH_MODE=token                    Ray's ports unpickle what they receive: nothing runs without a token
RAY_TRAIN_V2_ENABLED=1                 the Ray Train that this project is written for
RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.5  how often Ray Train looks at its workers; every report waits for one look
RAY_USAGE_STATS_ENABLED=0              nothing is sent anywhere
RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0   CPU actors keep the GPU visibility of their machine
TOKENIZERS_PARALLELISM=false           tokenizers fork badly
OMP_WAIT_POLICY=PASSIVE                processes share cores: a thread that spins for its peer holds it up (10 times
                                       slower steps were measured when two models ran on two cores)
GOMP_SPINCOUNT=1000                    but waking a sleeping thread costs as much as a small matrix product: some
                                       microseconds of spinning save a fifth of a step, and harm nobody
MAVIS_KEYS                             file of API keys that `jobs.serve` asks for (default: none on loopback, else
                                       keys.json); "none": serve whoever reaches the port
MAVIS_CACHE                            folder of prepared models (default ~/.cache/mavis_dist)
RAY_ADDRESS                            cluster to join; without it a local one is started
"""

from __future__ import annotations

import os

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
