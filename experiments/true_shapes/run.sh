#!/usr/bin/env bash
# The Qwen2-VL recipe at the model's true shape with random weights, on a GPU.
# usage: run.sh CONFIG_FOLDER COCO_FOLDER OUT   (CONFIG_FOLDER: config.json, preprocessor_config.json, tokenizer files)
set -euo pipefail
config="$1" coco="$2" out="$3"
here="$(cd "$(dirname "$0")" && pwd)"
python "$here/build.py" "$config" "$out/qwen2vl-2b" --device cuda
common=(experiment=qwen2vl_coco500 "model.path=$out/qwen2vl-2b" data=coco "data.path=$coco" data.splits.validation=4
        trainer.save_strategy=no logger=none "output_dir=$out" generation.max_new_tokens=16)
python -m mmft "${common[@]}" "run_dir=$out/recipe" trainer.max_steps=40
python -m mmft "${common[@]}" "run_dir=$out/without_checkpointing" trainer.max_steps=40 trainer.gradient_checkpointing=false evaluation.base=false
python -m mmft "${common[@]}" "run_dir=$out/fp16" trainer.max_steps=10 trainer.logging_steps=2 model.dtype=fp16 evaluation.base=false
python -m mmft "${common[@]}" "run_dir=$out/fp32" trainer.max_steps=10 trainer.logging_steps=2 model.dtype=fp32 evaluation.base=false
