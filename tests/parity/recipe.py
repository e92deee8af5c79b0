"""Weights and pictures by recipe: pure functions of a name, so that goldens need no files."""

from __future__ import annotations

import math
import zlib

import torch

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode("utf-8")))


def tensor_for(key: str, shape: tuple[int, ...], dtype: str = "float32", salt: str = ""):
    """The tensor of a checkpoint key: normal noise, scaled by the kind of parameter."""
    shape, wanted = tuple(int(n) for n in shape), _DTYPES[dtype]
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked" or not wanted.is_floating_point:
        return torch.zeros(shape, dtype=wanted)
    noise = torch.randn(shape, generator=_generator(key + salt), dtype=torch.float32)
    return _scaled(key, last, noise).to(wanted)


def _scaled(key: str, last: str, noise: torch.Tensor) -> torch.Tensor:
    if last == "running_var":
        return 1.0 + 0.1 * noise.abs()
    if last in ("running_mean", "bias") or last.endswith("_bias"):
        return 0.02 * noise
    if noise.ndim == 0:
        start = 0.5 if "clip_vision_alpha" in key else 4.0 if "clip_text_alpha" in key else 0.0
        return start + 0.1 * noise
    if last == "prompt_tokens":
        return noise
    if noise.ndim == 1:
        return 1.0 + 0.1 * noise if last == "weight" else noise / math.sqrt(max(1, len(noise)))
    fan_in = math.prod(noise.shape[1:])
    if noise.ndim == 4:
        return noise * math.sqrt(2.0 / fan_in)
    if ".lora_B." in key:
        return 0.02 * noise
    if key.endswith("embed_tokens.weight"):
        return 0.5 * noise
    return noise / math.sqrt(fan_in)


def image_for(name: str, width: int, height: int, salt: str = "") -> torch.Tensor:
    """A smooth colour field plus noise in integer arithmetic; uint8 (height, width, 3)."""
    generator = _generator("image:" + name + salt)
    grid = torch.randint(0, 256, (9, 9, 3), generator=generator, dtype=torch.int64)
    noise = torch.randint(-12, 13, (height, width, 3), generator=generator, dtype=torch.int64)

    def axis(length: int):
        position = (torch.arange(length, dtype=torch.int64) * (8 * 256)) // max(1, length - 1)
        low = torch.clamp(position // 256, max=8)
        return low, torch.clamp(low + 1, max=8), position - (position // 256) * 256

    y0, y1, wy = axis(height)
    x0, x1, wx = axis(width)
    wy, wx = wy[:, None, None], wx[None, :, None]
    top = grid[y0][:, x0] * (256 - wx) + grid[y0][:, x1] * wx
    low = grid[y1][:, x0] * (256 - wx) + grid[y1][:, x1] * wx
    field = (top * (256 - wy) + low * wy) // 65536
    return torch.clamp(field + noise, 0, 255).to(torch.uint8)
