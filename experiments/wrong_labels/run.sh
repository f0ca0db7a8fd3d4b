#!/usr/bin/env bash
# Are exchanged answers the training rows with the highest loss? Then leave the worst rows out and train again.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/wrong_labels
here=experiments/wrong_labels
mmft=($python -m mmft)

$python $here/build.py $out/shapes
data=(data=table data.path=$out/shapes/rows.jsonl data.columns.prompt=question data.columns.id=id data.splits.validation=128 data.splits.by=last logger=none output_dir=$out)
runs=()
for epochs in 1 2 6; do
  runs+=($out/epochs-$epochs)
  "${mmft[@]}" "${data[@]}" trainer.num_train_epochs=$epochs run_dir=$out/epochs-$epochs
  "${mmft[@]}" audit run=$out/epochs-$epochs rank=true output_dir=$out
done
"${mmft[@]}" "${data[@]}" trainer.num_train_epochs=2 data.without=$(ls $out/epochs-2/audit/*.txt) run_dir=$out/without
"${mmft[@]}" "${data[@]}" trainer.num_train_epochs=2 data.without=$out/shapes/swapped.txt run_dir=$out/without-swapped
cp $out/epochs-2/snapshot.yaml $here/snapshot.yaml
$python $here/measure.py $here/README.md $out/shapes/swapped.txt "${runs[@]}"
$python experiments/table.py $here/README.md $out/epochs-2 $out/without $out/without-swapped --name without --columns 'exact match=metrics.exact_match' 'loss=eval_loss'
$python experiments/picture.py $out/epochs-2/audit/*.html $here/worst.png
$python experiments/again.py $here/README.md $out $out/epochs-1
