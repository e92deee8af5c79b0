"""The figures of the lite detector's model card, on the DD-VQA test crops.

Run with: M2F2_DDVQA=FOLDER pytest tests/bench/test_lite_card.py -m bench -s
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from m2f2cli.checkpoints.load import load_detector
from m2f2cli.data.augment import add_noise, compress_jpeg, gaussian_blur, rescale
from m2f2cli.data.domain import Domain
from m2f2cli.data.images import read_picture
from m2f2cli.data.samples import REAL, read_samples
from m2f2cli.data.transforms import resize_and_crop
from m2f2cli.inference.pipeline import detect
from m2f2cli.metrics import average_precision, roc_auc
from m2f2cli.options.detect import DetectOptions

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif("M2F2_DDVQA" not in os.environ, reason="M2F2_DDVQA is not set"),
]
DRAWS = 10_000


def interval(figure, *columns: np.ndarray) -> str:
    """A figure with its 95 % percentile bootstrap interval over pictures."""
    rng, count, found = np.random.default_rng(0), len(columns[0]), []
    for _ in range(DRAWS):
        pick = rng.integers(0, count, count)
        labels = columns[0][pick]
        if labels.min() != labels.max():
            found.append(figure(*(column[pick] for column in columns)))
    low, high = np.quantile(found, [0.025, 0.975])
    return f"{figure(*columns):.3f} [{low:.3f}, {high:.3f}]"


def test_figures_on_the_test_crops():
    folder = Path(os.environ["M2F2_DDVQA"]) / "images" / "c40" / "test"
    samples = read_samples(f"ddvqa:{folder}").samples
    records = list(detect([str(s.path) for s in samples], options=DetectOptions(faces="none")))
    scores = np.array([record.fake_probability for record in records])
    labels = np.array([sample.label for sample in samples])
    kinds = np.array([sample.kind for sample in samples])
    inside = np.array([record.in_domain for record in records])
    verdicts = np.array([record.verdict for record in records])
    threshold = records[0].settings.threshold

    def accuracy(truth: np.ndarray, score: np.ndarray) -> float:
        return float(((score >= threshold) == truth).mean())

    print(f"\n{len(labels)} pictures, {int((labels == 0).sum())} real; in domain {inside.sum()}")
    print("AUC               ", interval(roc_auc, labels, scores))
    print("average precision ", interval(average_precision, labels, scores))
    print("accuracy          ", interval(accuracy, labels, scores), f"at {threshold:g}")
    for kind in sorted(set(kinds) - {REAL}):
        part = (kinds == kind) | (labels == 0)
        print(f"AUC {kind:14s}", interval(roc_auc, labels[part], scores[part]))
    for word in ("real", "fake", "uncertain"):
        told = verdicts == word
        print(f"verdict {word:10s} {int(told.sum()):4d}, of them fake {int(labels[told].sum())}")
    assert len(records) == len(samples) == 144
    assert all(record.status == "ok" for record in records)


def test_which_crops_and_photos_are_familiar():
    model = load_detector("lite", device="cpu")
    domain, size = Domain.from_config(model.config.domain), model.config.image_size
    folder = Path(os.environ["M2F2_DDVQA"]) / "images" / "c40" / "test"
    crops = [resize_and_crop(read_picture(p).pixels, size) for p in sorted(folder.glob("*.jpg"))]
    rng = np.random.default_rng(0)
    changes = {
        "as they are": lambda p: p,
        "JPEG quality 30": lambda p: compress_jpeg(p, 30),
        "JPEG quality 10": lambda p: compress_jpeg(p, 10),
        "blurred, sigma 1": lambda p: gaussian_blur(p, 1.0),
        "blurred, sigma 2": lambda p: gaussian_blur(p, 2.0),
        "half size and back": lambda p: rescale(p, 0.5),
        "noise, sigma 5": lambda p: add_noise(p, 5.0, rng),
    }
    print(f"\nlimit {domain.limit:.2f}")
    for name, change in changes.items():
        inside = np.mean([domain.distance(change(crop)) <= domain.limit for crop in crops])
        print(f"{name:20s} {inside:6.1%} of {len(crops)} test crops inside")
    photos = Path(__file__).parents[2] / "examples"
    for record in detect([str(photos)]):
        print(Path(record.path).name, record.verdict, record.fake_probability, record.reason)
