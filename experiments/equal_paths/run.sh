#!/usr/bin/env bash
# The same two points trained along five paths: features of the frozen vision part computed each time, kept in memory or on disk,
# one run after the other or in step.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/equal_paths
here=experiments/equal_paths
words=(lora.r=4,16 seed=1 trainer.max_steps=30 trainer.logging_steps=1 data.pictures=320 data.splits.validation=64 generation.max_new_tokens=48
  logger=none output_dir=$out)

$python -m mmft -m name=plain hydra/launcher=basic vision_cache=off "${words[@]}" "$@"
$python -m mmft -m name=memory hydra/launcher=basic vision_cache=memory "${words[@]}" "$@"
$python -m mmft -m name=disk hydra/launcher=basic vision_cache=disk "${words[@]}" "$@"
$python -m mmft -m name=joint hydra/launcher=joint vision_cache=off "${words[@]}" "$@"
$python -m mmft -m name=joint_memory hydra/launcher=joint vision_cache=memory "${words[@]}" "$@"
$python $here/compare.py $here/README.md $here/differences.png $out/sweeps/plain $out/sweeps/{memory,disk,joint,joint_memory}
run=$(ls -d $out/sweeps/plain/*r-4*)
cp "$run/snapshot.yaml" $here/snapshot.yaml
$python experiments/again.py $here/README.md $out "$run"
