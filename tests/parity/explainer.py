"""The golden explainer: LLaVA with a tiny LLaMA and a two-block CLIP, weights by recipe."""

from __future__ import annotations

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from m2f2cli.checkpoints import keymaps
from m2f2cli.data.transforms import explainer_views
from m2f2cli.models.explainer import Explainer, ExplainerConfig
from m2f2cli.models.processing import ExplainerProcessor
from m2f2cli.models.tokenizer import load_tokenizer
from tests.parity.published import state_dict
from tests.parity.recipe import image_for

FOLDER = Path(__file__).parent / "golden" / "llava_tiny"
_TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_CLIP_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def config(aspect: str = "pad") -> ExplainerConfig:
    published, clip = read("config"), read("clip-tiny/config")
    return ExplainerConfig(
        detector_config={
            "backbone": "densenet121",
            "clip": {
                "library": "transformers",
                "vision": {**_CLIP_DEFAULTS, **clip["vision_config"]},
                "text": {
                    **_CLIP_DEFAULTS,
                    "max_position_embeddings": 77,
                    **clip["text_config"],
                },
            },
        },
        text_config={name: published[name] for name in _TEXT_FIELDS},
        image_aspect=aspect,
    )


@lru_cache(maxsize=1)
def model() -> Explainer:
    """The explainer, the same for both aspects."""
    made = Explainer(config())
    expected = made.state_dict()
    found = keymaps.rename(state_dict("llava_tiny"), keymaps.PUBLISHED, what="The golden")
    # The published tower has blocks and a norm above the hidden state that is read.
    state = {
        key: tensor
        for key, tensor in found.items()
        if key in expected or not key.startswith(keymaps.TOWER_PART)
    }
    made.load_state_dict(state)
    return made.requires_grad_(False).eval()


def write_published(folder: Path) -> None:
    """The folder of a merged explainer as the published code saves it, in float32."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.model", "tokenizer_config.json", "config.json"):
        shutil.copyfile(FOLDER / name, folder / name)
    save_file(state_dict("llava_tiny"), folder / "model.safetensors")


@lru_cache(maxsize=2)
def processor(aspect: str = "pad") -> ExplainerProcessor:
    return ExplainerProcessor(load_tokenizer(FOLDER), config(aspect), explainer_views)


@lru_cache(maxsize=1)
def pictures() -> dict[int, np.ndarray]:
    """The golden pictures by their row: the synthetic one, and DD-VQA's where they are at hand."""
    found = {}
    folder = os.environ.get("M2F2_DDVQA")
    for row, image in enumerate(read("index")["images"]):
        if "synthetic" in image:
            found[row] = np.asarray(image_for(image["synthetic"], *image["size"]))
        elif folder:
            picture = Image.open(Path(folder) / "images" / "c40" / "test" / image["image"])
            picture = picture.convert("RGB")
            found[row] = np.asarray(picture.crop(image["crop"]) if image["crop"] else picture)
    return found


def prompts() -> dict[str, str]:
    texts = read("tokenization")["prompts"]
    return {name: texts[name]["text"] for name in read("index")["prompts"]}
