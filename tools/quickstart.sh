#!/usr/bin/env bash
# From nothing to a Mask R-CNN with box and mask AP: the environment if it is
# missing, digit scenes, training from scratch ONE image at a time with BCN
# and WS, COCO evaluation, a picture.
#
#   bash tools/quickstart.sh
#
# Run it again after an interruption: it goes on where it was. SEED, WORK_DIR
# and DATA may be set; arguments are settings of the config, as key=value.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
case ${STACK:-openmmlab} in
onedl) python=${VENV:-.venv-onedl}/bin/python ;;
*) python=${VENV:-.venv}/bin/python ;;
esac
# A second thread brings nothing to a network this small, and where other work
# has the cores, threads that wait for each other by spinning make it crawl.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
config=configs/digits/mask-rcnn_r18-slim_fpn_bcn-ws_1xb1-5e_digits.py
seed=${SEED:-0}
data=${DATA:-data/digit_scenes}
work_dir=${WORK_DIR:-work_dirs/quickstart}
options=(randomness.seed="$seed" train_dataloader.dataset.data_root="$data/"
    val_dataloader.dataset.data_root="$data/"
    test_dataloader.dataset.data_root="$data/"
    val_evaluator.ann_file="$data/annotations/instances_val.json"
    test_evaluator.ann_file="$data/annotations/instances_val.json"
    "$@")

if [ -f "$work_dir/metrics.json" ]; then
    echo "$work_dir is complete; remove it to run again."
    exec "$python" tools/quickstart_report.py "$work_dir"
fi
"$python" tools/dataset_converters/digit_scenes.py --out "$data"

mkdir -p "$work_dir"
log=$work_dir/quickstart.log
resumed=()
[ ! -f "$work_dir/last_checkpoint" ] || resumed=(--resumed)
fail() {
    tail -n 20 "$log" >&2
    echo "error: $1 failed; the end of $log is above." >&2
    exit 1
}
begin=$SECONDS
echo "Training, one image at a time (everything is in $log)"
"$python" -u tools/train.py "$config" --work-dir "$work_dir" --resume \
    --cfg-options "${options[@]}" 2>&1 | tee -a "$log" |
    sed -nu 's/.*Epoch(train) *\[\([0-9]*\)\]\[ *\([0-9]*\)\/\([0-9]*\)\].*eta: \([0-9:]*\).* loss: \([0-9.]*\) .*/  epoch \1  image \2 of \3  loss \5  \4 left/p' ||
    fail 'training'
echo 'Evaluating the checkpoint'
"$python" -u tools/test.py "$config" "$(cat "$work_dir/last_checkpoint")" \
    --work-dir "$work_dir/test" --cfg-options "${options[@]}" \
    test_evaluator.outfile_prefix="$work_dir/predictions" \
    >>"$log" 2>&1 || fail 'evaluation'
seconds=$((SECONDS - begin))
"$python" tools/visualization/prediction_picture.py \
    "$data/annotations/instances_val.json" "$data/leftImg8bit/val" \
    "$work_dir/predictions.segm.json" --out "$work_dir/predictions.png" \
    >>"$log" 2>&1 || fail 'drawing'
"$python" tools/quickstart_report.py "$work_dir" --seconds "$seconds" \
    ${resumed[@]+"${resumed[@]}"}
