"""A stand-in for a detector: its answers are plain arithmetic on the pixels."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m2f2cli.models.detector import Detector
from m2f2cli.records import Detection
from tests.detections import EXAMPLE

SIDE = 32


# A domain check that knows pictures of one colour only: their texture describes as log(0.05).
FLAT_ONLY = {"mean": [math.log(0.05)] * 6, "basis": np.eye(6).tolist(), "limit": 1.0}


class MeanJudge:
    """Calls a crop the more fake the brighter it is: probability = mean of the crop / 255.

    The forgery map is the brightness of 4 x 4 tiles. With kinds, the logits of the first two are
    ten times the means of red and of green.
    """

    leading_kinds = Detector.leading_kinds

    fingerprint = "sha256:mean"
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, **changes: Any) -> None:
        fields = {
            "image_size": SIDE,
            "image_mean": [0.0, 0.0, 0.0],
            "image_std": [1.0, 1.0, 1.0],
            "crop": {"detector": "dlib", "margin": 0.3},
            "threshold": 0.5,
            "uncertain": None,
            "score_temperature": 1.0,
            "domain": None,
            "forgery_map": True,
            "kinds": None,
            "kind_margin": None,
        }
        self.config = SimpleNamespace(**{**fields, **changes})
        self.batches: list[int] = []
        self.threads: set[int] = set()

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        self.batches.append(len(pixel_values))
        self.threads.add(threading.get_ident())
        p = pixel_values.mean(dim=(1, 2, 3)).clamp(1e-6, 1 - 1e-6)
        return SimpleNamespace(
            logits=torch.stack([torch.zeros_like(p), torch.log(p / (1 - p))], dim=1),
            forgery_map=torch.nn.functional.adaptive_avg_pool2d(pixel_values.mean(1), 4),
            kind_logits=10 * pixel_values.mean((2, 3))[:, :2] if self.config.kinds else None,
        )

    def fake_probability(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits / self.config.score_temperature).softmax(-1)[:, 1]


@pytest.fixture
def judge() -> MeanJudge:
    return MeanJudge()


@pytest.fixture(scope="session")
def record() -> Detection:
    return EXAMPLE


def write_picture(path: Path, level: int | tuple[int, int, int], size: int = 64) -> Path:
    """A square picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (level,) * 3 if isinstance(level, int) else level
    Image.new("RGB", (size, size), colour).save(path)
    return path


def noise_picture(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> Path:
    """A picture of noise around a seeded level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    level = rng.integers(20, 235)
    pixels = np.clip(rng.normal(level, 20, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path
