"""Small evaluations made by hand: no file of answers, no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from m2f2cli.evaluation.calibrate import Calibration
from m2f2cli.evaluation.protocols import Figure, Measures
from m2f2cli.evaluation.truth import Item, Joined, fingerprint

KINDS = ("real", "real", "Deepfakes", "FaceSwap")


def scores_set(count: int = 40, *, shift: float = 0.3, **changes: object) -> Joined:
    """Pictures with probabilities that tell the classes apart, not perfectly."""
    rng = np.random.default_rng(7)
    items = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        label = int(kind != "real")
        score = float(np.clip(rng.normal(0.5 + shift * (label - 0.5), 0.2), 0, 1).round(6))
        name = f"{kind}/{number:03d}.jpg"
        verdict = "fake" if score >= 0.5 else "real"
        items.append(Item(name, label, kind, name, fake_probability=score, verdict=verdict))
    return as_set(items, task="scores", threshold=0.5, model="lite", **changes)


def judgement_set() -> Joined:
    """Texts: one right, one wrong, one unread, one missing."""
    items = [
        Item("5_000.jpg", 0, "real", "5_000.jpg", answer="It is real.", verdict="real"),
        Item("5_003.jpg", 0, "real", "5_003.jpg", answer="It is <b>fake</b>.", verdict="fake"),
        Item("0_1_2.jpg", 1, "Deepfakes", "0_1_2.jpg", answer="I cannot tell."),
        Item("1_1_2.jpg", 1, "Face2Face", "1_1_2.jpg"),
    ]
    return as_set(items, task="judgement", missing=("1_1_2.jpg",))


def explanation_set() -> Joined:
    items = [
        Item("k_0", 1, "fake", "k", answer="The eyes look odd.", question="This is fake. Why?"),
        Item("k_1", 1, "fake", "k", answer="  ", question="This is fake. Why?"),
    ]
    return as_set(items, task="explanation", references={"k_0": ("The eyes.",), "k_1": ("Skin.",)})


def as_set(items: list[Item], **changes: object) -> Joined:
    fields = {
        "dataset": "images",
        "threshold": None,
        "model": None,
        "model_fingerprint": None,
        "data_fingerprint": fingerprint(items),
        "split": "test",
        "notes": ("A note with <brackets>.",),
    }
    return Joined(items=tuple(items), **{**fields, **changes})  # type: ignore[arg-type]


def some_measures(**figures: Figure) -> Measures:
    """Figures as a protocol would give them."""
    kinds = {
        "Deepfakes": {"auc": Figure(0.9, 0.8, 0.95), "accuracy": Figure(0.8, 0.7, 0.9)},
        "FaceSwap": {"auc": Figure(None, note="one class only"), "accuracy": Figure(0.6)},
    }
    return Measures(
        protocol="standard",
        figures=figures
        or {
            "frame_auc": Figure(0.875, 0.8, 0.93),
            "accuracy": Figure(0.8, 0.7, 0.9),
            "video_auc": Figure(None, note="no videos"),
        },
        per_kind=kinds,
        counts={"items": 40, "real": 20, "fake": 20, "missing": 0},
        definition={"aggregation": "mean", "level": 0.95, "resamples": 200, "seed": 0},
        notes=("Three items are uncertain.",),
    )


def calibrated(found: Calibration, probabilities: np.ndarray) -> np.ndarray:
    """Probabilities of the former temperature as the new one gives them, rounded as in records."""
    clipped = np.clip(probabilities, 5e-7, 1 - 5e-7)
    log_odds = np.log(clipped / (1 - clipped)) * found.temperature_before / found.temperature
    return np.round(1 / (1 + np.exp(-log_odds)), 6)


def picture(path: Path, side: int = 300) -> Path:
    pixels = np.random.default_rng(1).integers(0, 255, (side, side, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path
