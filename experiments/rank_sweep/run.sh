#!/usr/bin/env bash
# Five ranks, three seeds, twice: alpha fixed (the scale alpha / r falls as r rises), then alpha / r fixed. Thirty short trainings
# of the built-in tiny model, their leaderboards, the table and the picture, and one run again from its snapshot.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/rank_sweep
here=experiments/rank_sweep
words=(lora.r=2,4,8,16,32 seed=1,2,3 trainer.max_steps=30 data.pictures=704 data.splits.validation=64
  generation.max_new_tokens=48 logger=none output_dir=$out)

$python -m mmft -m name=alpha_fixed lora.lora_alpha=32 "${words[@]}" "$@"
$python -m mmft -m name=scale_fixed experiment=rank_sweep "${words[@]}" "$@"
for sweep in alpha_fixed scale_fixed; do cp $out/sweeps/$sweep/leaderboard.csv $here/$sweep.csv; done
cp "$(ls -d $out/sweeps/scale_fixed/*r-16*seed-1)/snapshot.yaml" $here/snapshot.yaml
for sweep in alpha_fixed scale_fixed; do
  $python experiments/means.py $here/README.md $here/$sweep.csv --name $sweep --by lora.r --columns scale eval_loss exact_match token_f1 trainable_parameters
done
$python experiments/picture.py $out/sweeps/scale_fixed/report.html $here/leaderboard.png
$python experiments/again.py $here/README.md $out "$(ls -d $out/sweeps/scale_fixed/*r-16*seed-1)"
