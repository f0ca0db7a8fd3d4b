#!/usr/bin/env bash
# Five ranks, three seeds, one scale: fifteen short trainings of the built-in tiny model, then their leaderboard.
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m mmft -m experiment=rank_sweep name=rank_sweep lora.r=2,4,8,16,32 seed=1,2,3 \
  trainer.max_steps=30 data.pictures=704 data.splits.validation=64 generation.max_new_tokens=48 logger=none "$@"
