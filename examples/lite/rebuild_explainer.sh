#!/usr/bin/env bash
# Rebuild the bundled lite explainer: examples/lite/rebuild_explainer.sh DDVQA_FOLDER WORK_FOLDER [DETECTOR]
# What is there already is not made again, and an interrupted stage goes on where it was.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$1 work=$2 detector=${3:-lite}
images=$data/images/c40/train
mkdir -p "$work"
step() { printf '== %s (%ss)\n' "$1" "$SECONDS"; }

step "what it learns from"
[ -d "$work/talks" ] || python "$here/talks.py" "$data" "$work/talks"

step "a language model that knows the words"
[ -f "$work/llava/config.json" ] || python "$here/language_model.py" "$work/talks/text.jsonl" "$detector" "$work/llava"

step "init-llava: with the detector"
[ -d "$work/explainer-0" ] || m2f2 init-llava --llava "$work/llava" --detector "$detector" --output "$work/explainer-0"

step "align: stage 2"
m2f2 align --config "$here/align.yaml" --model "$work/explainer-0" --data "$work/talks/judge.json" \
  --images "$images" --output "$work/delta-1" --resume
m2f2 merge --base "$work/explainer-0" --delta "$work/delta-1" --output "$work/explainer-1"

step "lora: stage 3"
m2f2 lora --config "$here/lora.yaml" --model "$work/explainer-1" --data "$work/talks/explain.json" \
  --images "$images" --output "$work/delta-2" --resume
m2f2 merge --base "$work/explainer-1" --delta "$work/delta-2" --dtype float16 --output "$work/explainer" --verify

step "how it does on the held-out people"
for condition in truth detector none; do
  m2f2 explain --dataset "$work/talks/validation.jsonl" --images "$images" --model "$work/explainer" \
    --condition "$condition" --max-new-tokens 128 --batch-size 64 --output "$work/validation_$condition.jsonl"
  m2f2 evaluate ddvqa --predictions "$work/validation_$condition.jsonl" --truth "$work/talks/validation.jsonl"
done
step "done: $work/explainer"
