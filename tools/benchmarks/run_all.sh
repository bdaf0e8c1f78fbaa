#!/usr/bin/env bash
# Are the kernels right, and how fast are they? The most telling steps first.
#
#   bash tools/benchmarks/run_all.sh               # the GPU if there is one
#   bash tools/benchmarks/run_all.sh smoke layers  # some steps
#   DEVICE=cpu bash tools/benchmarks/run_all.sh
#
# On a GPU every step has a limit, about 15 minutes in all. A step writes what
# it knows as it goes, so one that is cut off has lost nothing. Results, logs
# and results.tgz, which has them all, are in $OUT.
#
# A machine needs torch, triton, numpy, hypothesis and rich, and mmengine and
# mmcv or mmcv-lite. Steps of Mask R-CNN need mmdet too, and are said to be
# left out without it. Where mmcv's ops are not compiled for the device,
# torchvision's take their place. WHEELS=folder installs what lies there, for
# this run alone: a machine that reaches no registry brings its own.
set -uo pipefail
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
out=$(realpath -m "${OUT:-$root/work_dirs/benchmarks}")
wheels=${WHEELS:+$(realpath "$WHEELS")}
mkdir -p "$out"
cd "$root"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$wheels" ]; then
    site=${SITE:-$HOME/.cache/wsbcn_mm_site}
    if ! [ -d "$site" ]; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile \
            --target "$site.new" "$wheels"/*.whl || exit 1
        mv "$site.new" "$site"
    fi
    PYTHONPATH=$PYTHONPATH:$site
fi
device=${DEVICE:-$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
failed=()

step() { # name, limit in seconds, command
    local name=$1 limit=$2 begin=$SECONDS status=0
    shift 2
    [ "$device" = cuda ] || limit=0 # none
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    echo "== $name: exit $status after $((SECONDS - begin)) s"
    tail -n 30 "$out/$name.log" | cut -c1-400
    [ "$status" -eq 0 ] || failed+=("$name")
    (cd "$out" && ls | grep -v '^results.tgz' | tar -czf results.tgz.new -T - &&
        mv results.tgz.new results.tgz)
}

benchmark() { # name of the step, limit, script, options
    local name=$1 limit=$2 script=$3
    shift 3
    step "$name" "$limit" "$python" "tools/benchmarks/$script.py" \
        --device "$device" --out "$out" $SMALL "$@"
}

on_gpu() {
    [ "$device" = cuda ] && return
    echo "== $1 left out: it needs a GPU"
    return 1
}

has() { # module, step
    "$python" -c "import $1" 2>/dev/null && return
    echo "== $2 left out: there is no $1"
    return 1
}

SMALL=${SMALL:+--small}
repeats=$([ "$device" = cuda ] && echo 15 || echo 1)
dtypes=$([ "$device" = cuda ] && echo float32 float16 || echo float32)
all=(smoke mask_rcnn layers launches amp conv_ws tune parity memcheck folded)
for name in "${@:-${all[@]}}"; do
    case $name in
    smoke) # Without a GPU Triton's interpreter takes maps that are small.
        has triton smoke && if [ "$device" = cuda ]; then
            nvidia-smi -L
            benchmark smoke 170 smoke check repeat
        else
            SMALL=--small TRITON_INTERPRET=1 benchmark smoke 0 smoke
        fi
        ;;
    mask_rcnn)
        has mmdet mask_rcnn &&
            benchmark mask_rcnn 110 mask_rcnn_step --repeats "$repeats"
        ;;
    layers) benchmark layers 150 norm_layers ;;
    launches) has triton launches && benchmark launches 45 launch_cost ;;
    amp)
        on_gpu amp && has mmdet amp &&
            benchmark amp 90 mask_rcnn_step --repeats "$repeats" --amp
        ;;
    conv_ws) benchmark conv_ws 45 conv_ws --dtypes $dtypes ;;
    tune) on_gpu tune && benchmark tune 90 smoke tune large ;;
    parity)
        if [ "$device" = cuda ]; then
            step parity 120 "$python" tests/test_functional/kernel_parity.py \
                fused cuda 20
        else
            has triton parity && TRITON_INTERPRET=1 step parity 0 "$python" \
                tests/test_functional/kernel_parity.py fused cpu 20
        fi
        ;;
    memcheck)
        if ! command -v compute-sanitizer >/dev/null; then
            echo '== memcheck left out: there is no compute-sanitizer'
        elif on_gpu memcheck; then
            step memcheck 60 compute-sanitizer --tool memcheck "$python" \
                tools/benchmarks/smoke.py --out "$out/memcheck" check
        fi
        ;;
    folded) has mmdet folded && benchmark folded 60 folded_model ;;
    *)
        echo "error: no step $name; there are ${all[*]}"
        exit 1
        ;;
    esac
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed or cut off: ${failed[*]} (see the logs in $out)"
    exit 1
fi
