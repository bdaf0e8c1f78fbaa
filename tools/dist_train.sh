#!/usr/bin/env bash
# Train with several GPUs, on one machine or on several.
#
#   bash tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
#
# On several machines, run it on each with NNODES, its own NODE_RANK (0, 1,
# ...), and MASTER_ADDR and PORT of the first.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash $0 CONFIG GPUS [options of tools/train.py]" >&2
    exit 2
fi
config=$1
gpus=$2
shift 2
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$gpus" \
    "$(dirname "${BASH_SOURCE[0]}")/train.py" \
    "$config" --launcher pytorch "$@"
