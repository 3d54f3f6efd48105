#!/usr/bin/env bash
# One GPU.
set -euo pipefail
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
accelerate launch --config_file "$examples/accelerate_configs/single_gpu.yaml" "$examples/run_clm.py" "$@"
