"""Seconds a picture of the full-size detector B on a CPU, against the published arithmetic.

The last row tells how far bfloat16 could go: the products of one picture at the rate of the fastest
large product, with everything else free.

Run with: pytest tests/bench/test_full_size_speed.py -m bench -s
"""

from __future__ import annotations

import json
import statistics
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from m2f2cli.checkpoints.convert import import_weights
from m2f2cli.checkpoints.load import load_detector
from m2f2cli.data.transforms import preprocess
from m2f2cli.inference.optimize_cpu import PackedLinear
from m2f2cli.inference.pipeline import DetectPipeline
from m2f2cli.models.detector import Detector
from m2f2cli.options.detect import DetectOptions
from tests.parity.published import manifest, state_dict
from tests.parity.recipe import image_for

pytestmark = pytest.mark.bench
ROUNDS = 5


class Plain(nn.Module):
    """The published forward: all 24 CLIP blocks, eager attention, cached text feature."""

    def __init__(self, model: Detector, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        prefix = "clip_vision_encoder.model.vision_model."
        config = CLIPVisionConfig(**manifest("detector_b")["config"]["vision"])
        config._attn_implementation = "eager"
        self.tower = CLIPVisionModel(config).eval()
        self.tower.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
        self.rest = model
        self.text = model.text_feature()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        rest = self.rest
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        projected = rest.vision_proj(hidden)
        scores = nn.functional.cosine_similarity(projected[:, 1:], self.text[:, None], dim=-1)
        pooled = rest.backbone.net.features(pixels).mean((2, 3))
        parts = [rest.alpha_text * scores, rest.alpha_vision * projected[:, 0]]
        return rest.head(torch.cat([*parts, rest.backbone_proj(pooled)], dim=1))


def _product_rate() -> float:
    """Operations a second of the median of many large bfloat16 products."""
    rows, inputs, outputs = 4 * 577, 1024, 4096
    layer = PackedLinear(nn.Linear(inputs, outputs).bfloat16(), rows)
    values = torch.randn(rows, inputs).bfloat16()
    seconds = []
    for _ in range(40):
        begin = time.perf_counter()
        layer(values)
        seconds.append(time.perf_counter() - begin)
    return 2 * rows * inputs * outputs / statistics.median(seconds)


def _product_operations(model: Detector) -> int:
    """Of one picture; attention is counted by hand, for torch does not on a CPU."""
    size, vision = model.config.image_size, model.clip.vision
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    length = vision.grid**2 + 1
    return counter.get_total_flops() + 4 * length**2 * vision.width * len(vision.encoder.layers)


def test_seconds_a_picture(tmp_path):
    state = state_dict("detector_b")
    torch.save(state, tmp_path / "b.pth")
    import_weights([tmp_path / "b.pth"], tmp_path / "out")
    single, half = (
        DetectPipeline(str(tmp_path / "out"), DetectOptions(device="cpu", dtype=dtype)).detector
        for dtype in ("float32", "bfloat16")
    )
    config = single.config
    pictures = [np.asarray(image_for(f"speed{n}", 224, 224)) for n in range(4)]
    pixels = torch.stack(
        [
            torch.from_numpy(
                preprocess(p, size=config.image_size, mean=config.image_mean, std=config.image_std)
            )
            for p in pictures
        ]
    )
    with torch.inference_mode(False), torch.no_grad():
        untouched = load_detector(str(tmp_path / "out"), device="cpu", dtype="float32")
        plain = Plain(untouched, state)
        ways = {
            "published, float32, batch 1": lambda n: plain(pixels[n : n + 1]),
            "ours, float32, batch 1": lambda n: single(pixels[n : n + 1]).logits,
            "ours, bfloat16, batch 1": lambda n: half(pixels[n : n + 1].bfloat16()).logits,
            "ours, float32, batch 4": lambda n: single(pixels).logits,
            "ours, bfloat16, batch 4": lambda n: half(pixels.bfloat16()).logits,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(ROUNDS + 1):
            for name, run in ways.items():
                begin = time.perf_counter()
                run(turn % 4)
                spent = (time.perf_counter() - begin) / (4 if name.endswith("4") else 1)
                if turn:
                    seconds[name].append(spent)
        reference = single.fake_probability(torch.cat([plain(p[None]) for p in pixels]))
        drift = {
            "float32": (single.fake_probability(single(pixels).logits) - reference).abs().max(),
            "bfloat16": (half.fake_probability(half(pixels.bfloat16()).logits) - reference)
            .abs()
            .max(),
        }
        operations, rate = _product_operations(untouched), _product_rate()
    base = statistics.median(seconds["published, float32, batch 1"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"{name:28s} {middle:6.3f} s/picture  {base / middle:5.2f}x")
    floor = operations / rate
    print(f"{'bfloat16 products alone':28s} {floor:6.3f} s/picture  {base / floor:5.2f}x", end="  ")
    print(f"({operations / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s)")
    print(json.dumps({name: float(f"{value:.2e}") for name, value in drift.items()}))
    assert drift["float32"] < 1e-5
    assert drift["bfloat16"] < 0.02
    assert statistics.median(seconds["ours, float32, batch 1"]) < base
    assert base / statistics.median(seconds["ours, bfloat16, batch 4"]) >= 2.5
