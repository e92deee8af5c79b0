#!/usr/bin/env bash
# The whole chain with a small model on one CPU: examples/pipeline.sh DDVQA_FOLDER OUTPUT [PHOTO]
# Needs: pip install 'm2f2cli[eval]'. Run again, it goes on where it stopped.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath "$1") photo=$(realpath "${3:-$here/astronaut.jpg}")
crops=$data/images/c40
mkdir -p "$2"
cd "$2"
step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS" >&2; }

step "conversations"
if [ ! -e talks/truth_test_c40.jsonl ]; then
  m2f2 prepare ddvqa "$data" --output talks
fi

step "detector (stage 1), from the bundled one"
m2f2 train-detector --model lite --data "ddvqa:$data" --limit 48 --epochs 1 --batch-size 16 \
  --learning-rate 1e-5 --head-lr 1e-5 --resume --output detector

step "a small base in LLaVA's layout"
if [ ! -e base/config.json ]; then
  python "$here/pipeline_base.py" talks/train_*.json detector base
fi

step "explainer before its training"
if [ ! -e explainer-0/stage.json ]; then
  m2f2 init-llava --llava base --detector detector --output explainer-0
fi

step "align (stage 2)"
m2f2 align --model explainer-0 --data talks/train_judge_only_c40.json --images "$crops/train" \
  --limit 160 --batch-size 16 --no-gradient-checkpointing --learning-rate 1e-2 \
  --validation-share 0.1 --eval-steps 5 --answer-tokens 24 --resume --output delta-1
m2f2 merge --base explainer-0 --delta delta-1 --verify --output explainer-1

step "lora (stage 3)"
m2f2 lora --model explainer-1 --data talks/train_explain_c40.json --images "$crops/train" \
  --limit 240 --batch-size 16 --no-gradient-checkpointing --lora-r 16 --lora-alpha 32 \
  --learning-rate 2e-3 --projector-lr 1e-3 --validation-share 0.1 --answer-tokens 24 \
  --resume --output delta-2
m2f2 merge --base explainer-1 --delta delta-2 --verify --output explainer

step "explain a picture"
m2f2 explain "$photo" --model explainer --max-new-tokens 60

step "answer questions"
awk 'NR % 18 == 1' talks/test_c40.jsonl > questions.jsonl
m2f2 explain --dataset questions.jsonl --images "$crops/test" --model explainer --judge \
  --max-new-tokens 24 --output judgements.jsonl
m2f2 explain --dataset questions.jsonl --images "$crops/test" --model explainer \
  --condition detector --max-new-tokens 60 --output answers.jsonl

step "evaluate"
m2f2 evaluate ddvqa --predictions judgements.jsonl --truth questions.jsonl --report judged
m2f2 evaluate ddvqa --predictions answers.jsonl --truth questions.jsonl --report explained
step "done"
