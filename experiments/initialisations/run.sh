#!/usr/bin/env bash
# Five initialisations of LoRA at two learning rates, three seeds each: thirty short trainings of the built-in tiny model. Started again,
# it goes on with those that are not finished.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/initialisations
here=experiments/initialisations

$python -m mmft -m name=initialisations lora.init_lora_weights=true,pissa,eva,corda,lora_ga trainer.learning_rate=1e-3,3e-3 seed=1,2,3 \
  lora.r=8 lora.lora_alpha=16 trainer.num_train_epochs=2 trainer.logging_steps=4 data.pictures=700 data.splits.validation=100 \
  rank_by=eval_loss logger=none output_dir=$out "$@"
cp $out/sweeps/initialisations/leaderboard.csv $here/leaderboard.csv
cp "$(ls -d $out/sweeps/initialisations/*eva*rate-0.003*seed-1)/snapshot.yaml" $here/snapshot.yaml
$python experiments/means.py $here/README.md $here/leaderboard.csv --by trainer.learning_rate lora.init_lora_weights \
  --columns eval_loss exact_match token_f1
$python $here/curves.py $out/sweeps/initialisations $here/curves.png
