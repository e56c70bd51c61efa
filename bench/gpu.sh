#!/bin/sh
# Everything that issues and README say about a GPU, in under ten minutes, as JSON lines:
#
#   bench/gpu.sh                           on a machine with an NVIDIA GPU
#   bench/gpu.sh --tiny                    the very same at tiny sizes on the CPU, kernels in Triton's interpreter
#   bench/gpu.sh --mamba ~/mamba           against a checkout of state-spaces/mamba that need not be compiled
#   PYTHON=python3.12 bench/gpu.sh         with another interpreter than .venv's
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
for word in "$@"; do
    # Triton reads this when it is imported
    case $word in --tiny | --tiniest) export TRITON_INTERPRET=1 ;; esac
done
exec "$PYTHON" bench/gpu "$@"
