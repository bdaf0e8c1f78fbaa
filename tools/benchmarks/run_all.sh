#!/usr/bin/env bash
# Parity tests and every benchmark on this machine, into one folder.
#
#   bash tools/benchmarks/run_all.sh [folder]       # the GPU if there is one
#   DEVICE=cpu bash tools/benchmarks/run_all.sh     # about 10 minutes on 2 cores
#
# About 10 minutes on a GPU. Layers and convolutions need torch, mmengine and
# mmcv or mmcv-lite; Mask R-CNN steps and the folded model also mmdet, and are
# left out, and said to be, without it. Where mmcv's ops are not compiled for
# the device, torchvision's take their place in the steps.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out=${1:-work_dirs/benchmarks}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
device=${DEVICE:-$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
mkdir -p "$out"
failed=()

step() { # a name for the log, then a command
    local name=$1
    shift
    echo "== $name"
    "$@" >"$out/$name.log" 2>&1 || failed+=("$name")
    tail -n 30 "$out/$name.log"
}

step parity "$python" -m pytest -rs -k "cuda or parity" tests/test_functional \
    tests/test_layers
step norm_layers "$python" tools/benchmarks/norm_layers.py \
    --device "$device" --out "$out"
if "$python" -c 'import triton'; then
    step launch_cost "$python" tools/benchmarks/launch_cost.py \
        --device "$device" --out "$out"
else
    echo '== launch_cost left out: there is no triton'
fi
step conv_ws "$python" tools/benchmarks/conv_ws.py --device "$device" \
    --out "$out" $([ "$device" = cuda ] && echo --dtypes float32 float16)
if "$python" -c 'import mmdet'; then
    step mask_rcnn_step "$python" tools/benchmarks/mask_rcnn_step.py \
        --device "$device" --out "$out" \
        --repeats "$([ "$device" = cuda ] && echo 20 || echo 1)"
    [ "$device" = cuda ] &&
        step mask_rcnn_step_amp "$python" tools/benchmarks/mask_rcnn_step.py \
            --device "$device" --out "$out" --amp
    step folded_model "$python" tools/benchmarks/folded_model.py \
        --device "$device" --out "$out"
else
    echo "== mask_rcnn_step, folded_model left out: there is no mmdet"
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]} (see the logs in $out)"
    exit 1
fi
