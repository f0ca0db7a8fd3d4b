#!/usr/bin/env bash
# The tiny model learns where shapes are, with the token table and the output layer trained, and without.
#   experiments/boxes/run.sh [STEPS]      (about 10 minutes on two idle cores)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/boxes
here=experiments/boxes
steps=${1:-500}

common=(data=drawn_boxes data.fewest=1 data.most=2 data.pictures=2128 model.boxes=percent lora.r=32 trainer.max_steps="$steps"
        evaluation.max_samples=128 logger=none "output_dir=$out")
$python -m mmft "${common[@]}" 'lora.modules_to_save=[embed_tokens,lm_head]' "run_dir=$out/tokens"
$python -m mmft "${common[@]}" "run_dir=$out/adapter"
cp "$out/tokens/snapshot.yaml" "$here/snapshot.yaml"
$python experiments/table.py $here/README.md "$out/tokens" "$out/adapter" --columns trained=trainable_parameters 'base IoU=base_metrics.mean_iou' 'IoU=metrics.mean_iou' \
  'IoU of 0.5 or more=metrics.box_accuracy_50' 'IoU of 0.75 or more=metrics.box_accuracy_75' 'held-out loss=eval_loss'
$python experiments/picture.py "$out/tokens/report.html" "$here/report.png" 1200 1900
