#!/usr/bin/env bash
# LoRA on q and v alone against LoRA on every linear layer of the language model, at equal ranks and at equal numbers of parameters.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/targets
here=experiments/targets

$python -m mmft -m name=targets experiment=rank_sweep 'lora.target_modules=[q_proj,v_proj],all-linear' lora.r=4,16,64 seed=1,2 \
  trainer.max_steps=30 data.pictures=704 data.splits.validation=64 generation.max_new_tokens=48 logger=none output_dir=$out "$@"
cp $out/sweeps/targets/leaderboard.csv $here/leaderboard.csv
run=$(ls -d $out/sweeps/targets/*all-linear*r-16*seed-1)
cp "$run/snapshot.yaml" $here/snapshot.yaml
$python experiments/means.py $here/README.md $here/leaderboard.csv --by lora.target_modules lora.r --columns trainable_parameters eval_loss exact_match token_f1
$python experiments/picture.py $out/sweeps/targets/report.html $here/leaderboard.png
