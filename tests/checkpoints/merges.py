"""Small checkpoints and deltas of every kind to merge."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from m2f2cli.checkpoints import adapters, io
from tests.models import explainers

PREFIX = "base_model.model."
RANK = 4
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "target_modules": ["q_proj", "down_proj"],
    "modules_to_save": ["mm_projector", "forgery_projector"],
}
PROJECTORS = ("mm_projector.", "forgery_projector.")


def base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """An explainer of two layers; its detector stays float32."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            if not key.startswith("detector."):
                tensors[key] = tensors[key].to(dtype)

    explainers.write_explainer(folder, change=change)
    return folder


def noise(like: torch.Tensor, seed: int, scale: float = 0.1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(like.shape, generator=generator)


def stage_2(folder: Path, parent: Path, seed: int = 1, **changes: Any) -> Path:
    """A delta of ours that holds the forgery projector."""
    tensors = {
        key: noise(tensor, seed).to(tensor.dtype)
        for key, tensor in io.read_tensors(parent).items()
        if key.startswith("forgery_projector.")
    }
    tensors = {key: t for key, t in {**tensors, **changes}.items() if t is not None}
    stage = {"stage": "align", "parent": io.fingerprint(parent)}
    adapters.write_delta(folder, tensors=tensors, stage=stage)
    return folder


def adapter(parent: Path, seed: int = 2) -> dict[str, torch.Tensor]:
    """Updates of q_proj and down_proj in every layer, and both projectors, by PEFT's names."""
    found = {}
    for n, (key, tensor) in enumerate(sorted(io.read_tensors(parent).items())):
        module = key.removesuffix(".weight")
        if key.startswith("language_model.") and module.endswith(("q_proj", "down_proj")):
            outputs, inputs = tensor.shape
            down, up = torch.empty(RANK, inputs), torch.empty(outputs, RANK)
            found[f"{PREFIX}{module}.lora_A.weight"] = noise(down, seed + 2 * n)
            found[f"{PREFIX}{module}.lora_B.weight"] = noise(up, seed + 2 * n + 1)
        elif key.startswith(PROJECTORS):
            found[f"{PREFIX}{key}"] = noise(tensor, seed + 2 * n)
    return found


def stage_3(folder: Path, parent: Path, *, config: Any = None, **changes: Any) -> Path:
    """A PEFT adapter of ours; a tensor given as None is left out."""
    tensors = {key: t for key, t in {**adapter(parent), **changes}.items() if t is not None}
    stage = {"stage": "lora", "parent": io.fingerprint(parent)}
    adapters.write_delta(folder, tensors=tensors, stage=stage, adapter=config or CONFIG)
    return folder


def foreign(folder: Path, parent: Path, *, config: Any = None, **changes: Any) -> Path:
    """The same as PEFT alone writes it, without a stage.json."""
    stage_3(folder, parent, config=config)
    tensors = {key: t for key, t in {**adapter(parent), **changes}.items() if t is not None}
    save_file(tensors, folder / adapters.ADAPTER)
    (folder / "stage.json").unlink()
    return folder


def spoiled(folder: Path, source: Path, name: str, content: bytes) -> Path:
    """A copy with one file of other content."""
    shutil.copytree(source, folder)
    (folder / name).write_bytes(content)
    return folder
