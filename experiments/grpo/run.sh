#!/usr/bin/env bash
# A model that names the right colour or another one at random learns the right one from an exact match as its reward: five losses of GRPO.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/grpo
here=experiments/grpo

$python experiments/preferences/build.py $out/pictures 480
$python $here/run.py $out # all commands in one process: starting Python takes longer than most of them
cp $out/dapo-1/snapshot.yaml $here/snapshot.yaml
cp $out/dapo-1/loss_curve.png $here/reward.png
$python $here/measure.py $here/README.md $out
$python experiments/again.py $here/README.md $out $out/dapo-1
