#!/usr/bin/env bash
# Installs this checkout, with the versions that were run together, into the Python that is first in PATH: what the
# Dockerfile runs. Anywhere else, use a virtual environment.
#
#   k8s/install.sh serve    # what the service needs
#   k8s/install.sh train    # and training
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1-}" in
  serve) package=".[s3]" proof="import serve.app" ;;
  train) package=".[train,s3]" proof="import jobs.pipeline, mavis_dist.pipeline, mavis_dist.train.engine, deepspeed" ;;
  *) echo "usage: $0 serve|train" >&2; exit 2 ;;
esac
python -m pip install --quiet --no-cache-dir --constraint constraints.txt --editable "$package"
python -m pip check
PYTHONPATH=$PWD python -c "$proof"
