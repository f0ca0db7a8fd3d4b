#!/usr/bin/env bash
# Four learning rates of the vision part beside one of the language model and the connector, two seeds each: eight short trainings of the
# built-in tiny model with an adapter on all parts.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/part_rates
here=experiments/part_rates

$python -m mmft -m name=part_rates lora.scope=all trainer.learning_rates.vision=0,3e-4,3e-3,3e-2 seed=1,2 trainer.num_train_epochs=2 \
  data.pictures=700 data.splits.validation=100 rank_by=exact_match logger=none output_dir=$out "$@"
cp $out/sweeps/part_rates/leaderboard.csv $here/part_rates.csv
cp "$(ls -d $out/sweeps/part_rates/*vision-0.0003*seed-1)/snapshot.yaml" $here/snapshot.yaml
$python experiments/means.py $here/README.md $here/part_rates.csv --name part_rates --by trainer.learning_rates.vision --columns eval_loss exact_match token_f1
