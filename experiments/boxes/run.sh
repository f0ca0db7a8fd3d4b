#!/usr/bin/env bash
# The tiny model learns to answer with the box of a shape that a question names.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/boxes
here=experiments/boxes

$python -m mmft run_dir=$out/boxes output_dir=$out data=drawn_boxes data.fewest=1 data.most=2 data.pictures=4128 data.splits.validation=128 \
  model.boxes=percent 'lora.modules_to_save=[embed_tokens,lm_head]' trainer.num_train_epochs=8 trainer.max_steps=1500 logger=none
cp $out/boxes/snapshot.yaml $here/snapshot.yaml
$python $here/figures.py $out/boxes $here/README.md
$python experiments/picture.py $out/boxes/report.html $here/report.png 1100 2200
