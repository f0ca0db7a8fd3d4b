#!/usr/bin/env bash
# The recipes at the true shape of their models, with random weights, each through the command a user types, for a few steps on a CPU.
#   experiments/recipes/run.sh CONFIGS COCO_FOLDER WORK [RECIPE...]     (RECIPE: blip2 llava qwen2vl swanlab table; all of them)
# CONFIGS holds blip2-opt-2.7b, Qwen1.5-4B-Chat, clip-vit-large-patch14-336 and Qwen2-VL-2B-Instruct: config.json, preprocessor_config.json,
# tokenizer files. Needs 16 GB of memory and 35 GB of disk; the models stay in WORK until they are removed by hand.
set -euo pipefail
configs="$1" coco="$2" work="$3"
shift 3
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python}"
build() { [ -d "$work/$2" ] || "$python" "$here/../true_shapes/build.py" "$configs/$1" "$work/$2"; }
# what a machine without a GPU asks for: few steps, few held-out rows, few words; nothing of the recipe itself
short=(evaluation.max_samples=2 generation.max_new_tokens=4)

[ $# -gt 0 ] || set -- blip2 llava qwen2vl swanlab table
for recipe in "$@"; do case "$recipe" in
  blip2)   # 8-bit by bitsandbytes; the hub on 127.0.0.1 serves photos in place of the football pictures
    build blip2-opt-2.7b blip2
    "$python" "$here/stand_in.py" football "$coco" \
      "$python" -m mmft experiment=blip2_football "model.path=$work/blip2" trainer.max_steps=3 trainer.logging_steps=1 "${short[@]}" "run_dir=$work/blip2_football" ;;
  llava)   # 4 billion parameters: the parts are removed once they are one
    build clip-vit-large-patch14-336 clip
    if [ ! -d "$work/llava" ]; then
      build Qwen1.5-4B-Chat qwen1.5
      "$python" -m mmft assemble "llm=$work/qwen1.5" "vision=$work/clip" "out=$work/llava"
      rm -r "$work/qwen1.5"
    fi
    [ -d "$work/cc3m" ] || "$python" "$here/stand_in.py" cc3m "$coco" "$work/cc3m"
    "$python" -m mmft experiment=llava_cc3m "model.path=$work/llava" "data.path=$work/cc3m" model.dtype=bf16 trainer.max_steps=2 trainer.logging_steps=1 "${short[@]}" \
      "run_dir=$work/llava_cc3m" ;;
  qwen2vl | swanlab)   # without a login SwanLab writes an offline run
    build Qwen2-VL-2B-Instruct qwen2vl
    name=qwen2vl_coco500; [ "$recipe" = qwen2vl ] || name=qwen2vl_coco500_swanlab
    "$python" -m mmft "experiment=$name" "model.path=$work/qwen2vl" "data.path=$coco" model.dtype=bf16 trainer.max_steps=3 trainer.logging_steps=1 "${short[@]}" \
      "run_dir=$work/$name" ;;
  table)
    runs=()
    for name in blip2_football llava_cc3m qwen2vl_coco500 qwen2vl_coco500_swanlab; do
      if [ -f "$work/$name/DONE" ]; then runs+=("$work/$name"); sed "s#$work#outputs/recipes#; s#$coco#outputs/coco#" "$work/$name/snapshot.yaml" >"$here/$name.snapshot.yaml"; fi
    done
    "$python" "$here/../table.py" "$here/README.md" "${runs[@]}" --columns 'parameters=total_parameters' 'trained=trainable_parameters' \
      'rows a step=effective_batch_size' steps 's a step=times.train/steps' 'to first step, s=times.to_first_step' 'peak memory, MB=peak_memory_mb' \
      'adapter, MB=size:adapter' 'first loss=train_loss.first' 'last=train_loss.last'
    sed "s#$work#outputs/recipes#g" "$work/blip2_football/report.html" >"$work/report.html"
    "$python" "$here/../picture.py" "$work/report.html" "$here/report.png" ;;
  *) echo "no recipe $recipe" >&2; exit 1 ;;
esac; done
