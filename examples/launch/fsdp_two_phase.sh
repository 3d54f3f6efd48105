#!/usr/bin/env bash
# FSDP in two phases: train to a checkpoint, cut it, go on with the smaller model and the same optimizer.
#   CUT_AT=30 TOLERANCE=0.1 RUN=runs/fsdp CONFIG=my_fsdp.yaml launch/fsdp_two_phase.sh --max_steps 300
set -euo pipefail
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
run=${RUN:-runs/fsdp} cut_at=${CUT_AT:-30}
config=${CONFIG:-$examples/accelerate_configs/fsdp.yaml}
launch() { accelerate launch --config_file "$config" "$examples/run_clm.py" --compress false --save_strategy steps "$@"; }

launch --output_dir "$run/big" --stop_after "$cut_at" "$@"
hf-compressm compress "$run/big/checkpoint-$cut_at" --output "$run/small/checkpoint-$cut_at" --tolerance "${TOLERANCE:-0.1}"
launch --output_dir "$run/small" --model_name_or_path "$run/small/checkpoint-$cut_at" \
  --resume_from_checkpoint "$run/small/checkpoint-$cut_at" "$@"
