"""The golden explainer's checkpoints as the published code writes them, and its parts."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

import torch

from tests.parity.published import manifest
from tests.parity.recipe import tensor_for

FOLDER = Path(__file__).parents[1] / "parity" / "golden" / "llava_tiny"
CLIP_CONFIG = FOLDER / "clip-tiny" / "config.json"
_HALF = ("clip_vision_alpha", "clip_text_alpha", "prompt_tokens")


@lru_cache
def as_saved() -> dict[str, torch.Tensor]:
    """The merged explainer: float16, its detector bfloat16 but for three tensors."""
    found = {}
    for key, (shape, dtype) in manifest("llava_tiny")["tensors"].items():
        if dtype == "float32":
            inside = key.startswith("deepfake_encoder.") and not key.endswith(_HALF)
            dtype = "bfloat16" if inside else "float16"
        found[key] = tensor_for(key, shape, dtype)
    return found


def base() -> dict[str, torch.Tensor]:
    """A LLaVA without detector and detector's projector, float16."""
    return {key: t for key, t in as_saved().items() if not key.startswith("deepfake_")}


def detector() -> dict[str, torch.Tensor]:
    """The detector as a flat file, float32, without a CLIP vision tower."""
    tensors = manifest("llava_tiny")["tensors"]
    return {
        key.removeprefix("deepfake_encoder."): tensor_for(key, shape, dtype)
        for key, (shape, dtype) in tensors.items()
        if key.startswith("deepfake_encoder.")
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], file: str) -> Path:
    """A folder with the golden configuration and tokeniser."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for name in ("tokenizer.model", "tokenizer_config.json", "config.json"):
        shutil.copyfile(FOLDER / name, folder / name)
    (save_file if file.endswith(".safetensors") else torch.save)(tensors, folder / file)
    return folder
