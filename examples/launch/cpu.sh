#!/usr/bin/env bash
# Two processes on the CPU. Further arguments go to the script: launch/cpu.sh --max_steps 100
set -euo pipefail
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
accelerate launch --config_file "$examples/accelerate_configs/cpu.yaml" "$examples/run_clm.py" --use_cpu true "$@"
