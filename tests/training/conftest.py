"""A toy data set that a tiny detector can learn, and a tiny CLIP folder to start from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

import m2f2cli.models  # noqa: F401 - before transformers
from m2f2cli.options.train_detector import TrainDetectorOptions
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


# Pairs of the toy's official splits; the last is of nobody else.
TOY_SPLITS = {
    "train": [["000", "001"], ["002", "003"], ["004", "005"]],
    "val": [["006", "007"], ["008", "009"]],
    "test": [["010", "011"]],
}
TOY_KINDS = ("Deepfakes", "FaceSwap")


def write_toy_ffpp(root: Path, *, frames: int = 5, edge: int = 40) -> Path:
    """FaceForensics++ of 12 people: 12 original and 24 forged videos, and the split files."""
    rng = np.random.default_rng(1)
    (root / "splits").mkdir(parents=True)
    pairs = [pair for split in TOY_SPLITS.values() for pair in split]
    for split, rows in TOY_SPLITS.items():
        (root / "splits" / f"{split}.json").write_text(json.dumps(rows))
    for name in ("original", *TOY_KINDS):
        with h5py.File(root / f"FF++_{name}_c23.h5", "w") as file:
            for a, b in pairs:
                for key in (a, b) if name == "original" else (f"{a}_{b}", f"{b}_{a}"):
                    pictures = [
                        toy_picture(rng, forged=name != "original", edge=edge)
                        for _ in range(frames)
                    ]
                    clip = np.stack([np.asarray(picture) for picture in pictures])
                    file.create_dataset(key, data=clip, chunks=(1, edge, edge, 3))
    return root


@pytest.fixture(scope="session")
def toy_ffpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``write_toy_ffpp``; never changed by a test."""
    return write_toy_ffpp(tmp_path_factory.mktemp("ffpp") / "crops")


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
