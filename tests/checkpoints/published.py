"""Small published-looking checkpoints: every published key, CLIP cut down to a few values."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

import torch

from tests.parity.recipe import tensor_for

MANIFESTS = Path(__file__).parents[1] / "parity" / "manifests"
WIDTH, INNER, BLOCKS, SIDE, PATCH = 24, 40, 3, 32, 8
CLIP_CONFIG = {
    "model_type": "clip",
    "vision_config": {"num_attention_heads": 2, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS},
    "text_config": {"num_attention_heads": 4, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS},
}
_BLOCK = re.compile(r"_model\.encoder\.layers\.(\d+)\.")


def manifest(name: str) -> dict[str, tuple[list[int], str]]:
    return json.loads((MANIFESTS / f"{name}.json").read_text())["tensors"]


@lru_cache
def detector(name: str, hidden: int = 12) -> dict[str, torch.Tensor]:
    """Detector ``detector_a`` or ``detector_b`` with tiny CLIP towers and projections."""
    old_hidden = 1792 if name == "detector_a" else 1024
    state = {}
    for key, (shape, dtype) in manifest(name).items():
        block = _BLOCK.search(key)
        if block and int(block.group(1)) >= BLOCKS:
            continue
        state[key] = tensor_for(key, _shrunk(key, shape, old_hidden, hidden), dtype)
    return state


def _shrunk(key: str, shape: list[int], old: int, hidden: int) -> tuple[int, ...]:
    tokens = (SIDE // PATCH) ** 2
    clip_width = {1024: WIDTH, 768: WIDTH, 4096: INNER, 3072: INNER}
    if key.endswith("vision_model.embeddings.position_embedding.weight"):
        return (tokens + 1, WIDTH)
    if key.endswith("patch_embedding.weight"):
        return (WIDTH, 3, PATCH, PATCH)
    if key.endswith("token_embedding.weight"):
        return (50, WIDTH)
    if "_model." in key or key.endswith("prompt_tokens") or key.startswith("clip_reduction.w"):
        return tuple(clip_width.get(n, n) for n in shape)
    if key == "output.weight":
        return (2, 2 * hidden + (128 if old == 1792 else tokens))
    if key.startswith("deepfake_proj.0.weight"):
        return (hidden, shape[1])
    if key.startswith(("text_proj.0.weight", "vision_proj.0.weight")):
        return (hidden, WIDTH)
    if key.startswith(("deepfake_proj", "text_proj", "vision_proj")):
        return (hidden,)
    return tuple(shape)


def stage_1(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """The published stage-1 wrapper, with its pickled scheduler."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    return {
        "epoch": 180,
        "model_state_dict": {f"module.{key}": tensor for key, tensor in state.items()},
        "optimizer_state_dict": optimizer.state_dict(),
        "iter": 7,
        "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        "val_loss": 0.1,
    }


def split_tower(
    state: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A detector without its CLIP vision part, and that part as ``vision_tower.pth`` has it."""
    begin = "clip_vision_encoder.model."
    rest = {key: tensor for key, tensor in state.items() if not key.startswith(begin)}
    tower = {
        f"vision_tower.{key.removeprefix(begin)}": tensor
        for key, tensor in state.items()
        if key.startswith(begin)
    }
    return rest, tower
