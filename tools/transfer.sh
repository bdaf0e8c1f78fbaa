#!/usr/bin/env bash
# The way from ImageNet to COCO in miniature: a classifier of digit crops is
# trained with MMPretrain (BCN and WS), its backbone is published, and Mask
# R-CNN is fine-tuned from it, one image at a time, against the same number of
# steps from scratch.
#
#   bash tools/transfer.sh
#
# SEED, WORK_DIR and DATA may be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
case ${STACK:-openmmlab} in
onedl) python=${VENV:-.venv-onedl}/bin/python ;;
*) python=${VENV:-.venv}/bin/python ;;
esac
seed=${SEED:-0}
data=${DATA:-data}
work_dir=${WORK_DIR:-work_dirs/transfer}
scenes=$data/digit_scenes
crops=$data/digit_crops
configs=configs/digits_transfer
mkdir -p "$work_dir"

"$python" tools/dataset_converters/digit_scenes.py --out "$scenes"
"$python" tools/dataset_converters/digit_crops.py --scenes "$scenes" \
    --out "$crops"

train() { # name config option...
    local name=$1 config=$2
    shift 2
    echo "Training $name (everything is in $work_dir/$name.log)"
    if ! "$python" tools/train.py "$configs/$config" \
        --work-dir "$work_dir/$name" --cfg-options randomness.seed="$seed" \
        "$@" >"$work_dir/$name.log" 2>&1; then
        tail -n 20 "$work_dir/$name.log" >&2
        exit 1
    fi
}

train classifier resnet18-slim_bcn-ws_1xb16-4e_digit-crops.py \
    train_dataloader.dataset.data_root="$crops/" \
    val_dataloader.dataset.data_root="$crops/"
"$python" tools/model_converters/backbone.py \
    "$(cat "$work_dir/classifier/last_checkpoint")" \
    "$work_dir/resnet18-slim_bcn-ws.pth" | tee "$work_dir/backbone.txt"
backbone=$(sed -n 's/^Wrote \(.*\.pth\):.*/\1/p' "$work_dir/backbone.txt")

annotations=$scenes/annotations/instances_val.json
detection=(train_dataloader.dataset.data_root="$scenes/"
    val_dataloader.dataset.data_root="$scenes/"
    test_dataloader.dataset.data_root="$scenes/"
    val_evaluator.ann_file="$annotations"
    test_evaluator.ann_file="$annotations")
train scratch mask-rcnn_r18-slim-scratch_fpn_bcn-ws_1xb1-400_digits.py \
    "${detection[@]}"
train transfer mask-rcnn_r18-slim_fpn_bcn-ws_1xb1-400_digits.py \
    "${detection[@]}" model.backbone.init_cfg.checkpoint="$backbone"

echo
grep -ho 'accuracy/top1: [0-9.]*' "$work_dir/classifier.log" | tail -n 1
for name in scratch transfer; do
    printf '%-9s' "$name"
    grep -ho 'coco/\(bbox\|segm\)_mAP: *[0-9.]*' "$work_dir/$name.log" |
        tr '\n' ' '
    echo
done
