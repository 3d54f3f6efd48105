#!/usr/bin/env bash
# All GPUs of this machine: launch/multi_gpu.sh --per_device_train_batch_size 4
set -euo pipefail
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
accelerate launch --config_file "$examples/accelerate_configs/multi_gpu.yaml" --num_processes "$gpus" \
  "$examples/run_clm.py" "$@"
