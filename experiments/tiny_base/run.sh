#!/bin/sh
# The shipped tiny base, from nothing: build, pretrain in two stages, export, measure. Run from the repository root.
# 5 min 15 s of training on one GPU (the runs of README.md); on a CPU the same commands take hours.
set -eu

python experiments/tiny_base/build.py outputs/tiny_untrained

PRETRAIN="lora=none data=scenes trainer=default trainer.per_device_train_batch_size=128 trainer.adam_beta2=0.98
  trainer.weight_decay=0.02 trainer.logging_steps=25 trainer.dataloader_num_workers=6
  evaluation.base=false evaluation.batch_size=256 logger=none"

# 1. captions and three questions a picture, 60,000 pictures, from random weights
python -m mmft $PRETRAIN model.path=outputs/tiny_untrained run_dir=outputs/tiny_stage1 \
  data.pictures=60000 data.captions=0.35 data.turns=3 \
  trainer.learning_rate=2e-3 trainer.warmup_steps=200 trainer.max_steps=700

# 2. four questions a picture and fewer captions, on 21,000 other pictures
python -m mmft $PRETRAIN model.path=outputs/tiny_stage1/model run_dir=outputs/tiny_stage2 \
  data.pictures=21000 data.captions=0.1 data.turns=4 data.seed=1 \
  trainer.learning_rate=1.2e-3 trainer.warmup_steps=25 trainer.max_steps=330

python experiments/tiny_base/export.py outputs/tiny_stage2/model mmft/assets/tiny
python experiments/tiny_base/measure.py mmft/assets/tiny 100

# the adaptation it was made for, over three seeds
for seed in 1 2 3; do
  python -m mmft seed=$seed run_dir=outputs/tiny_shapes_$seed logger=none
done
