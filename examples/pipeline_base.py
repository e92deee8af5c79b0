"""Make a small LLaVA-shaped base for ``pipeline.sh``: a tokeniser and a LLaMA of one million
weights that has read conversations, with a projector that has seen no picture.

    python examples/pipeline_base.py CONVERSATIONS.json... DETECTOR OUTPUT
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

from m2f2cli.runtime import cure_torchvision, seed_everything

cure_torchvision()

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import (  # noqa: E402
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from m2f2cli.data.conversations import read_conversations  # noqa: E402
from m2f2cli.models.conversation import (  # noqa: E402
    DEEPFAKE_ID,
    IMAGE_ID,
    VICUNA_V1,
    encode,
    turns_of,
)
from m2f2cli.models.tokenizer import load_tokenizer  # noqa: E402

WORDS, WIDTH, STEPS, ROWS = 1200, 128, 50, 16
TEXTS = 1000  # how many conversations of a file are read
CUT = re.compile("<image>|<deepfake>|</s>")
SHOWN = 24  # line breaks that stand for a picture, at most


def texts(file: Path) -> list[str]:
    """Conversations as the language model reads them, placeholders included."""
    found = read_conversations(file)[:TEXTS]
    return [VICUNA_V1.render(turns_of(c.parts))[0] for c in found]


def write_tokenizer(folder: Path, lines: list[str]) -> None:
    """Byte pairs over words that begin with a space, as a LLaMA's."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(
        (CUT.sub(" ", line) for line in lines),
        trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, show_progress=False),
    )
    made.pre_tokenizer = None
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.save(str(folder / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    fields = {"tokenizer_class": "LlamaTokenizer", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def picture_of(ids: list[int], line: int, patches: int) -> tuple[list[int], list[int]]:
    """A conversation's tokens and their positions: some line breaks stand for a picture's patches,
    at places where these will be, and one for the detector's answer."""
    place = ids.index(IMAGE_ID)
    shown = sorted(random.sample(range(patches), random.randint(1, SHOWN)))
    rest = [line if token == DEEPFAKE_ID else token for token in ids[place + 1 :]]
    where = [*range(place), *(place + n for n in shown)]
    where += range(place + patches, place + patches + len(rest))
    return [*ids[:place], *[line] * len(shown), *rest], where


def train(model: LlamaForCausalLM, rows: list[list[int]], *, line: int, patches: int) -> None:
    """Teach it to foretell the next token."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=STEPS)
    for step in range(STEPS):
        some = [picture_of(ids, line, patches) for ids in random.sample(rows, ROWS)]
        ids, where = (
            pad_sequence([torch.tensor(row[n]) for row in some], batch_first=True) for n in (0, 1)
        )
        labels = ids.masked_fill((ids == 0) | (ids == line), -100)
        loss = model(input_ids=ids, position_ids=where, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"base: step {step}, loss {loss.item():.3f}", file=sys.stderr)


def main(files: list[Path], detector: Path, output: Path) -> None:
    """Write the base in LLaVA's own layout; the CLIP tower will be the detector's."""
    seed_everything(0)
    output.mkdir(parents=True, exist_ok=True)
    lines = [text for file in files for text in texts(file)]
    write_tokenizer(output, lines)
    tokenizer = load_tokenizer(output)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2))
    tower = json.loads((detector / "config.json").read_text())["clip"]["vision"]
    line = encode("\n", tokenizer)[-1]
    rows = [encode(text, tokenizer) for text in lines]
    train(model, rows, line=line, patches=(tower["image_size"] // tower["patch_size"]) ** 2)
    tensors = dict(model.state_dict())
    # Every patch begins as a line break; stage 3 teaches the projector to say more.
    tensors |= {
        "model.mm_projector.0.weight": torch.randn(WIDTH, tower["hidden_size"]) / WIDTH**0.5,
        "model.mm_projector.0.bias": torch.zeros(WIDTH),
        "model.mm_projector.2.weight": torch.zeros(WIDTH, WIDTH),
        "model.mm_projector.2.bias": tensors["model.embed_tokens.weight"][line].clone(),
    }
    save_file(tensors, output / "model.safetensors")
    config = {
        "model_type": "llava_llama",
        **sizes,
        "image_aspect_ratio": "pad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": tower["hidden_size"],
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (output / "config.json").write_text(json.dumps(config, indent=2))  # last: the folder is whole


if __name__ == "__main__":
    *FILES, DETECTOR, OUTPUT = map(Path, sys.argv[1:])
    main(FILES, DETECTOR, OUTPUT)
