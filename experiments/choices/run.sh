#!/usr/bin/env bash
# One shape in a picture, eight classes: the same models measured on written and on chosen answers, with each normalisation.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/choices
here=experiments/choices

$python $here/build.py $out/shapes 60
$python $here/run.py $out # all commands in one process: starting Python takes longer than most of them
cp $out/steps-40/snapshot.yaml $here/snapshot.yaml
$python $here/measure.py $here/README.md $out/steps-8 $out/steps-40
$python experiments/picture.py $out/steps-40/report.html $here/report.png 1200 2700
$python experiments/again.py $here/README.md $out $out/steps-40
