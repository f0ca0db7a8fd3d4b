#!/usr/bin/env bash
# A model that does not know which of two colours is right learns it from pairs: each objective, and DPO with three strengths.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/preferences
here=experiments/preferences

$python $here/build.py $out/pairs 480
$python $here/run.py $out # all commands in one process: starting Python takes longer than most of them
runs=$(ls -d $out/sweeps/betas/*/ $out/sweeps/objectives/*/ | grep -v earlier)
cp $out/sweeps/betas/objective.beta-0.1/snapshot.yaml $here/snapshot.yaml
$python $here/measure.py $here/README.md $out/sft $runs
$python experiments/picture.py $out/sweeps/betas/objective.beta-0.1/report.html $here/report.png 1200 2300
$python experiments/again.py $here/README.md $out $out/sweeps/objectives/objective-kto
