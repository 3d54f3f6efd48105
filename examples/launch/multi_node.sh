#!/usr/bin/env bash
# Several machines; start it on each: RANK_OF_MACHINE=0 FIRST_MACHINE=10.0.0.1 launch/multi_node.sh --output_dir /shared/run
set -euo pipefail
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${RANK_OF_MACHINE:?0 on the first machine, 1 on the second, ...}" "${FIRST_MACHINE:?address of the first machine}"
accelerate launch --config_file "$examples/accelerate_configs/multi_node.yaml" \
  --machine_rank "$RANK_OF_MACHINE" --main_process_ip "$FIRST_MACHINE" "$examples/run_clm.py" "$@"
