#!/usr/bin/env bash
# How many of the draws must be old rows, so that a new task does not cost an old skill? Five weights in one sweep, for each seed.
#   experiments/mixing_weight/run.sh [SEED ...]      1 2 3; sweeps that are finished are not trained again
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/mixing_weight
here=experiments/mixing_weight
seeds=("$@")
[ $# -gt 0 ] || seeds=(1 2 3)

boards=()
for seed in "${seeds[@]}"; do
  $python -m mmft -m name=weights${seed#1} data=mix data.draws=1600 \
    data.sources.inventory=shapes data.sources.inventory.pictures=1728 \
    data.sources.captions=scenes data.sources.captions.captions=1.0 data.sources.captions.pictures=800 data.sources.captions.seed=3 \
    data.sources.captions.splits.validation=0 data.sources.captions.weight=0,0.05,0.2,0.5,1 \
    evaluation.keep=scenes evaluation.keep.scenes.data.captions=1.0 evaluation.keep.scenes.data.seed=5 evaluation.keep.scenes.data.pictures=192 \
    evaluation.keep.scenes.data.splits.validation=128 evaluation.keep_metrics=[exact_match,cider] \
    rank_by=exact_match seed=$seed trainer.max_steps=120 logger=none output_dir=$out
  boards+=($out/sweeps/weights${seed#1}/leaderboard.csv)
done
for board in "${boards[@]}"; do if [ $board = ${boards[0]} ]; then cat $board; else tail -n +2 $board; fi; done >$here/weights.csv
cp $out/sweeps/weights/data.sources.captions.weight-0.2/snapshot.yaml $here/snapshot.yaml
$python experiments/means.py $here/README.md $here/weights.csv --name weights --by data.sources.captions.weight \
  --columns exact_match eval_loss keep.scenes.exact_match keep.scenes.cider keep.scenes.loss
$python -m mmft report run=$out/sweeps/weights by=keep.scenes.exact_match
$python experiments/picture.py $out/sweeps/weights/report.html $here/kept.png 1200 1250
$python -m mmft report run=$out/sweeps/weights by=exact_match
$python experiments/picture.py $out/sweeps/weights/report.html $here/leaderboard.png 1200 1250
