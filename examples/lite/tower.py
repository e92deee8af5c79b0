"""Make the lite detector's CLIP tower: a small random CLIPModel that stage 1 trains.

    python examples/lite/tower.py OUTPUT

The forgery map learns from the masks of pseudo-forgeries (``map-weight`` in train.yaml), so the
tower sees where a forgery lies without a label of a real one. Contrastive pre-training on the 1,070
pictures and their texts was tried first: the held-out loss stayed at chance.
"""

from __future__ import annotations

import sys

from m2f2cli.runtime import cure_torchvision, seed_everything

cure_torchvision()

from transformers import CLIPConfig, CLIPModel  # noqa: E402

VISION = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 224,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


if __name__ == "__main__":
    seed_everything(0)
    CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION)).save_pretrained(sys.argv[1])
