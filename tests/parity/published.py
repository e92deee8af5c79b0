"""Checkpoint files as the published code writes them, and the golden numbers it gave for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from tests.parity.recipe import image_for, tensor_for

HERE = Path(__file__).parent


def manifest(name: str) -> dict[str, Any]:
    return json.loads((HERE / "manifests" / f"{name}.json").read_text())


def state_dict(name: str) -> dict[str, torch.Tensor]:
    return {
        key: tensor_for(key, shape, dtype)
        for key, (shape, dtype) in manifest(name)["tensors"].items()
    }


def golden(name: str) -> tuple[dict[str, torch.Tensor], list[np.ndarray]]:
    """The golden tensors, one row a picture, and those pictures as (H, W, 3) uint8."""
    with safe_open(HERE / "golden" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        images = json.loads(file.metadata()["images"])
    pictures = []
    for image in images:
        _, kind, _ = image["name"].split(":")
        pictures.append(np.asarray(image_for(kind, *image["size"])))
    return tensors, pictures


class Plateau:
    """Stands for the learning-rate scheduler that the published stage-1 file pickles."""

    def __init__(self) -> None:
        self.factor = 0.4


def write_stage_1(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Detector A's container: a wrapper, a ``module.`` prefix and a pickled object."""
    torch.save(
        {
            "epoch": 180,
            "model_state_dict": {f"module.{key}": tensor for key, tensor in state.items()},
            "optimizer_state_dict": {"state": {}, "param_groups": []},
            "iter": 7,
            "scheduler": Plateau(),
            "val_loss": 0.1,
        },
        path,
    )
