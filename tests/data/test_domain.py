from __future__ import annotations

import numpy as np
import pytest

from m2f2cli.data.augment import compress_jpeg, gaussian_blur
from m2f2cli.data.domain import Domain, blur, describe_texture


def crop(seed: int, side: int = 96) -> np.ndarray:
    """A smooth random picture with a little grain, JPEG-compressed."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_blur(rng.integers(0, 256, (side, side, 3), dtype=np.uint8), 3.0)
    grain = rng.normal(0, 2, smooth.shape)
    noisy = np.clip(smooth.astype(float) + grain, 0, 255).astype(np.uint8)
    return compress_jpeg(noisy, int(rng.integers(60, 90)))


@pytest.fixture(scope="module")
def domain() -> Domain:
    found = np.stack([describe_texture(crop(seed)) for seed in range(160)])
    return Domain.fit(found[:120], found[120:], quantile=0.95)


def test_crops_of_the_same_kind_lie_inside(domain):
    inside = [domain.distance(crop(seed)) <= domain.limit for seed in range(1000, 1040)]
    assert sum(inside) >= 32


@pytest.mark.parametrize(
    "change",
    [
        lambda p: gaussian_blur(p, 2.0),
        lambda p: np.random.default_rng(0).integers(0, 256, p.shape, dtype=np.uint8),
        lambda p: np.full_like(p, 90),
        lambda p: compress_jpeg(p, 5),
    ],
    ids=["blurred", "noise", "flat", "crushed"],
)
def test_other_textures_lie_outside(domain, change):
    assert all(domain.distance(change(crop(seed))) > domain.limit for seed in range(2000, 2010))


def test_blur_equals_a_direct_convolution():
    values = np.random.default_rng(1).random((20, 24)).astype(np.float32)
    radius, sigma = 3, 0.7
    steps = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (steps / sigma) ** 2)
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    padded = np.pad(values, radius, mode="edge")
    expected = np.array(
        [[(padded[y : y + 7, x : x + 7] * kernel).sum() for x in range(24)] for y in range(20)]
    )
    assert np.allclose(blur(values, sigma), expected, atol=1e-5)


def test_it_survives_the_configuration(domain):
    again = Domain.from_config(domain.to_config())
    assert again.distance(crop(5)) == domain.distance(crop(5))
    assert again.limit == domain.limit
