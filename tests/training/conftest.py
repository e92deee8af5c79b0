"""A toy data set that a tiny detector can learn, and a tiny CLIP folder to start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import m2f2cli.models  # noqa: F401 - before transformers
from m2f2cli.training.options import TrainDetectorOptions
from tests.conftest import TINY_CLIP, TINY_SIDE

Options = Callable[..., TrainDetectorOptions]


def toy_picture(rng: np.random.Generator, *, forged: bool, edge: int = 40) -> Image.Image:
    """Smooth random colours; a forged one is redder in the middle."""
    coarse = rng.integers(40, 200, (4, 4, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((edge, edge), Image.Resampling.BICUBIC))
    if forged:
        pixels = pixels.copy()
        pixels[10:30, 10:30, 0] = 255
    return Image.fromarray(pixels)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks only wait for a second thread; bits are compared at one thread count."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 people, a real and a forged picture of each: real/NN.png, fake/NN.png."""
    root = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    for word in ("real", "fake"):
        (root / word).mkdir()
        for person in range(12):
            picture = toy_picture(rng, forged=word == "fake")
            picture.save(root / word / f"p{person:02d}.png")
    return root


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers CLIPModel folder of a few thousand weights."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = TINY_CLIP["text"] | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=TINY_CLIP["vision"], projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def options(toy_data: Path, clip_folder: Path, tmp_path: Path) -> Options:
    """Builds options of a run that takes a second; any of them can be changed."""

    def build(**changes: Any) -> TrainDetectorOptions:
        small = {
            "data": str(toy_data),
            "output": tmp_path / "detector",
            "clip": str(clip_folder),
            "backbone": "test_efficientnet",
            "backbone_weights": "none",
            "hidden_size": 12,
            "prompt_tokens": 3,
            "image_size": TINY_SIDE,
            "epochs": 2,
            "batch_size": 6,
            "validation_share": 0.25,
            "device": "cpu",
            "report_to": "none",
        }
        return TrainDetectorOptions.from_flat(small | changes)

    return build
