#!/usr/bin/env bash
# The tiny model learns to answer with a JSON object: how well, and does it still write captions?
#   experiments/json_answers/run.sh [json|mixed]      mixed: with captions among the training rows
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/json_answers
here=experiments/json_answers
name=${1:-json}
run=$out/$name

[ -f $out/drawn/schema.json ] || $python $here/build.py $out/drawn
$python -m mmft run_dir=$run data=table data.path=$out/drawn/$name.jsonl data.columns.prompt=prompt data.columns.split=split data.columns.id=id \
  metrics=[json] metrics.json.schema=$out/drawn/schema.json rank_by=json_f1 \
  evaluation.keep=scenes evaluation.keep.scenes.data.captions=1.0 evaluation.keep.scenes.data.seed=5 evaluation.keep.scenes.data.pictures=192 \
  evaluation.keep.scenes.data.splits.validation=128 evaluation.keep_metrics=[exact_match,cider] \
  trainer.max_steps=160 trainer.num_train_epochs=4 logger=none output_dir=$out
cp $run/snapshot.yaml $here/$name.snapshot.yaml
$python $here/figures.py $run $here/README.md $name
$python experiments/picture.py $run/report.html $here/$name.png 1100 2000
