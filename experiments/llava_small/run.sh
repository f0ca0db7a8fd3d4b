#!/usr/bin/env bash
# The whole study: two packages -> two folders -> one LLaVA -> projector aligned -> LoRA -> does it look at the picture?
#   experiments/llava_small/run.sh COCO_FOLDER [WORK_FOLDER]      (about 12 minutes on two idle cores, 4 GB of memory)
set -euo pipefail
photos="$1"
work="${2:-outputs/llava_small}"
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python}"
mkdir -p "$work"

# 1. the pretrained parts; gguf and onnx are needed to read them and are no dependencies of mmft
PYTHON="$python" bash "$here/parts.sh" "$work"

# 2. put together; 112 pixels give 64 image tokens instead of 256, which makes a step four times as fast
[ -d "$work/llava" ] || "$python" -m mmft assemble llm="$work/parts/llm" vision="$work/parts/vision" out="$work/llava" image_size=112

# 3. all five captions of 118 photos; those of 24 photos are held out
data=(data=coco "data.path=$photos" data.captions=all data.splits.validation=120 "output_dir=$work" evaluation.split=null logger=none)
[ -d "$work/aligned/model" ] || "$python" -m mmft experiment=llava_align model.path="$work/llava" run_dir="$work/aligned" "${data[@]}" \
  trainer.max_steps=110 trainer.learning_rate=2e-3
[ -d "$work/tuned/adapter" ] || "$python" -m mmft experiment=llava_tune model.path="$work/aligned/model" run_dir="$work/tuned" "${data[@]}" \
  trainer.max_steps=30 trainer.learning_rate=3e-4

# 4. held-out loss with the right picture, with other pictures and with a grey one; answers
"$python" "$here/measure.py" "$work" "${data[@]:0:5}"
