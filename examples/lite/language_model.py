"""Make the base of the lite explainer: a tokeniser and a small LLaMA that knows how DD-VQA speaks.

    python examples/lite/language_model.py TEXT.jsonl DETECTOR OUTPUT

It learns from words alone; pictures come in with m2f2 align and m2f2 lora. The folder has LLaVA's
own layout, with a projector that has not learnt yet, so that m2f2 init-llava takes it like any
other LLaVA.
"""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch import nn

from m2f2cli.checkpoints.io import read_config
from m2f2cli.models.conversation import DDVQA, VICUNA_V1, Turn, encode_with_labels
from m2f2cli.models.tokenizer import load_tokenizer
from m2f2cli.runtime import cure_torchvision, seed_everything

cure_torchvision()

from safetensors.torch import save_file  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from m2f2cli.checkpoints.hub import resolve_checkpoint  # noqa: E402

WORDS = 1280
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
EPOCHS, BATCH, RATE = 1, 16, 1e-3


def make_tokenizer(rows: list[dict[str, str]], folder: Path) -> Any:
    """A byte-pair tokeniser with LLaMA's settings, which can spell any byte."""
    sentences = [text for row in rows for text in (row["question"], row["answer"])]
    frames = [template.render([Turn("")])[0] for template in (VICUNA_V1, DDVQA)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences + 100 * frames),
        model_writer=model,
        model_type="bpe",
        vocab_size=WORDS,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    fields = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return load_tokenizer(folder)


def exercise(row: dict[str, str], tokenizer: Any) -> dict[str, Any]:
    text, answers = VICUNA_V1.render([Turn(row["question"], row["answer"])])
    ids, labels = encode_with_labels(text, answers, tokenizer)
    return {"input_ids": ids, "labels": labels, "length": len(ids)}


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(item["length"] for item in items)
    batch = {"input_ids": 0, "labels": -100}
    padded = {
        name: torch.tensor([item[name] + [fill] * (longest - item["length"]) for item in items])
        for name, fill in batch.items()
    }
    mask = torch.tensor([[n < item["length"] for n in range(longest)] for item in items])
    return {**padded, "attention_mask": mask}


def train(model: LlamaForCausalLM, exercises: list[dict[str, Any]], output: Path) -> None:
    arguments = TrainingArguments(
        output_dir=f"{output}.training",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.03 * EPOCHS * len(exercises) / BATCH),
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        train_sampling_strategy="group_by_length",
        use_cpu=True,
        bf16=True,
        logging_steps=50,
        save_strategy="epoch",
        save_total_limit=1,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    Trainer(model, arguments, train_dataset=exercises, data_collator=collate).train()


def write_llava(model: LlamaForCausalLM, vision_width: int, folder: Path) -> None:
    """LLaVA's own layout: LLaMA's tensors and the projector of patches, still as it was drawn."""
    width = model.config.hidden_size
    projector = nn.Sequential(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))
    drawn = {f"model.mm_projector.{name}": t for name, t in projector.state_dict().items()}
    tensors = {name: t.contiguous() for name, t in (model.state_dict() | drawn).items()}
    save_file(tensors, folder / "model.safetensors")
    extra = {
        "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision_width,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    }
    config = model.config.to_dict() | extra
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")


def main(texts: Path, detector: str, output: Path) -> None:
    seed_everything(0)
    set_seed(0)
    rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    tokenizer = make_tokenizer(rows, output)
    exercises = [exercise(row, tokenizer) for row in rows]
    lengths = np.array([one["length"] for one in exercises])
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES))
    print(f"{len(rows)} exercises, {lengths.mean():.0f} tokens on average, {lengths.max()} at most")
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} words")
    train(model, exercises, output)
    vision = read_config(resolve_checkpoint(detector))["clip"]["vision"]["hidden_size"]
    write_llava(model, vision, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
