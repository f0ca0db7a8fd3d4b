#!/usr/bin/env bash
# Known mistakes, each trained beside its correction: pictures that never reach BLIP-2, loss on the prompt, a wrong or untrained end token.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
out=outputs/experiments/mistakes
here=experiments/mistakes
export PYTHONPATH=$here MMFT_PACKAGES=mistakes # the package with the mistakes, and leave to build it from a config
mmft=($python -m mmft --config-dir $here/conf)

$python $here/build.py $out/made
blip2=(model=blip2 model.path=$out/made/blip2 data=imagefolder data.path=$out/made/colours data.splits.validation=16 'data.splits.by=last'
  lora.scope=all trainer.max_steps=120 trainer.learning_rate=5e-3 generation.max_new_tokens=8 logger=none output_dir=$out)
# mmft refuses such runs before their first step: what it says is kept, and task.audit=false trains them all the same
refused() { "${mmft[@]}" "$@" logger=none evaluation.base=false 2>&1 | tail -n 1 | cut -d ';' -f 1 >>$out/refusals.txt || true; }
rm -f $out/refusals.txt
refused name=refused collator=blind_caption "${blip2[@]}"
refused name=refused collator=no_end output_dir=$out
refused name=refused collator=pad_end output_dir=$out
"${mmft[@]}" -m name=blip2 task.audit=false collator=caption,blind_caption seed=1,2 "${blip2[@]}"
"${mmft[@]}" -m name=chat task.audit=false collator=chat,prompt_loss,no_end,pad_end seed=1,2 trainer.max_steps=60 data.pictures=1024 \
  data.splits.validation=64 logger=none output_dir=$out
cp $out/sweeps/chat/*pad_end*seed-1/snapshot.yaml $here/snapshot.yaml
$python $here/measure.py $here/README.md $out/refusals.txt $out/sweeps/blip2 $out/sweeps/chat
$python experiments/picture.py $out/sweeps/chat/report.html $here/leaderboard.png
$python experiments/again.py $here/README.md $out $out/sweeps/blip2/collator-caption_seed-1
