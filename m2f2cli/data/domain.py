"""The domain check: how far a crop's texture lies from that of the crops a detector was trained on.

A crop is described by how much detail it has at three scales: the spread and the typical size of
its luma in three band-pass pictures. Compression, blur, sharpening, noise and resizing move these
numbers, faces hardly do; a detector's own features, tried first, let blurred and sharpened
pictures pass. The distance is Mahalanobis', from the training crops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_SIGMAS = (0.7, 1.4, 2.8)  # of the successive blurs, in pixels at the network's input size
_BORDER = 16
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_FLOOR = 0.05  # keeps the logarithm of a flat picture finite


def describe_texture(pixels: np.ndarray) -> np.ndarray:
    """Measure the detail of a crop.

    Args:
        pixels: (S, S, 3) uint8 RGB at the network's input size, S above 32.

    Returns:
        (6,) float64: for each band, fine to coarse, the logarithms of its deviation and of its
        median magnitude, in levels of 255.
    """
    current = pixels.astype(np.float32) @ _LUMA
    border = min(_BORDER, pixels.shape[0] // 8)
    found = []
    for sigma in _SIGMAS:
        smooth = blur(current, sigma)
        band = (current - smooth)[border:-border, border:-border]
        found += [band.std(), np.median(np.abs(band))]
        current = smooth
    described: np.ndarray = np.log(np.asarray(found, dtype=np.float64) + _FLOOR)
    return described


def blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of float32 (H, W), the border repeated outwards; sigma in pixels."""
    radius = int(4 * sigma + 0.5)
    steps = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (steps / sigma) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    for _ in range(2):  # down, then across, on the transposed picture
        padded = np.pad(values, ((radius, radius), (0, 0)), mode="edge")
        total = np.zeros_like(values)
        for place, weight in enumerate(kernel):
            total += weight * padded[place : place + len(values)]
        values = np.ascontiguousarray(total.T)
    return values


@dataclass(frozen=True)
class Domain:
    """Where the training crops lie, and how far from them a detector still answers.

    Args:
        mean: (6,) mean description of the training crops.
        basis: (6, 6), turns a deviation from the mean into one of unit variance.
        limit: Largest distance inside the domain.
    """

    mean: np.ndarray
    basis: np.ndarray
    limit: float

    @classmethod
    def fit(cls, training: np.ndarray, held_out: np.ndarray, *, quantile: float) -> Domain:
        """Learn from descriptions of the training crops (N, 6), N at least 7, and of held-out ones.

        The limit is the ``quantile``, in (0, 1], of the distances of ``held_out`` (M, 6).
        """
        mean = training.mean(0)
        covariance = np.cov(training, rowvar=False) + 1e-4 * np.eye(training.shape[1])
        values, vectors = np.linalg.eigh(covariance)
        basis = np.ascontiguousarray(vectors.T / np.sqrt(values)[:, None])
        distances = np.linalg.norm((held_out - mean) @ basis.T, axis=1)
        return cls(mean, basis, float(np.quantile(distances, quantile)))

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> Domain:
        """Read it from a detector's configuration."""
        return cls(np.asarray(fields["mean"]), np.asarray(fields["basis"]), float(fields["limit"]))

    def to_config(self) -> dict[str, Any]:
        """As plain numbers for a detector's configuration."""
        return {"mean": self.mean.tolist(), "basis": self.basis.tolist(), "limit": self.limit}

    def distance(self, pixels: np.ndarray) -> float:
        """Distance of a crop (S, S, 3) from the training crops, 0 or more."""
        return float(np.linalg.norm(self.basis @ (describe_texture(pixels) - self.mean)))
