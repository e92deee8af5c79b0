"""Small real things every test may use: a tiny detector and its checkpoint folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from PIL import Image

from m2f2cli.runtime import cure_torchvision

cure_torchvision()  # before any test module imports transformers, timm or open_clip

# Tests must not depend on the caller's settings, nor reach a hub.
# M2F2_FACES is the variable of --faces; a folder in it is that of the research pictures.
if os.path.isdir(folder := os.environ.get("M2F2_FACES", "")):
    os.environ.setdefault("FACES_DATA", folder)
for name in [n for n in os.environ if n.startswith("M2F2_") and n != "M2F2_DDVQA"]:
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"
# An example may take long on a busy machine, or because it is the first to import something.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

TINY_SIDE = 32
# How a stored picture must be turned to stand upright, for each EXIF orientation; and back.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
TINY_CLIP = {
    "library": "transformers",
    "vision": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": TINY_SIDE,
        "patch_size": 8,
    },
    "text": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 16,
    },
}


def tiny_fields(**changes: Any) -> dict[str, Any]:
    """The fields of a tiny detector with every part the large one has."""
    return {
        "backbone": "test_efficientnet",
        "clip": TINY_CLIP,
        "hidden_size": 20,
        "prompt_tokens": 3,
        "image_size": TINY_SIDE,
        **changes,
    }


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every tensor values that hide no fault: no zeros, no ones, positive variances."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if key.endswith("running_var"):
                tensor.copy_(1 + 0.1 * noise.abs())
            elif key.endswith("weight") and tensor.ndim == 1:
                tensor.copy_(1 + 0.1 * noise)
            elif tensor.ndim > 1:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(0.3 * noise)
    return module


def write_detector(folder: Path, **changes: Any) -> Path:
    """A checkpoint folder of a tiny detector with random weights; changes are of its config."""
    from m2f2cli.checkpoints import io
    from m2f2cli.models.detector import Detector, DetectorConfig

    model = randomise(Detector(DetectorConfig(**tiny_fields(**changes))))
    io.write_checkpoint(
        folder, config=model.config.to_dict(), tensors=model.state_dict(), stage={"stage": "test"}
    )
    return folder


@pytest.fixture(scope="session")
def tiny_detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a tiny detector with random weights."""
    return write_detector(tmp_path_factory.mktemp("checkpoints") / "tiny")
