"""How much of what annotators say of a forged picture its features could tell the lite explainer.

Run with: M2F2_DDVQA=FOLDER pytest tests/bench/test_lite_explainer_limit.py -m bench -s

Ridge regressions on the lite detector's features foretell, of people that it was not trained on,
which regions annotators called fake and which flaws they named (``read_judgements``). Over all
pictures that is partly to tell real from forged; over the forged ones alone it is what an explainer
would have to see in a picture, beyond the detector's number, to say why this one is forged.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from m2f2cli.checkpoints.load import load_detector
from m2f2cli.data.images import read_picture
from m2f2cli.data.readers.ddvqa import read_ddvqa, read_judgements
from m2f2cli.data.samples import REAL, kind_of, split_by_identity
from m2f2cli.data.transforms import preprocess
from m2f2cli.metrics import Ranking, area

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif("M2F2_DDVQA" not in os.environ, reason="M2F2_DDVQA is not set"),
]
HELD_OUT = {"share": 0.15, "seed": 0}  # as examples/lite/train.yaml has it
GRID = 4  # patches are averaged to so many by so many
DRAWS = 1000


class Part(NamedTuple):
    forged: np.ndarray  # (N,) bool
    said: np.ndarray  # (N, 14) bool
    features: dict[str, np.ndarray]  # each (N, width)


def read(samples, crops: Path, annotations: Path) -> Part:
    detector = load_detector("lite", device="cpu", dtype="float32")
    config, size = detector.config, detector.config.image_size
    stems = [Path(sample.name).stem for sample in samples]
    judged = read_judgements(annotations, stems)
    columns: dict[str, list[np.ndarray]] = {"verdict": [], "backbone": [], "patches": []}
    for stem in stems:
        pixels = read_picture(crops / f"{stem}.jpg").pixels
        pixels = preprocess(pixels, size=size, mean=config.image_mean, std=config.image_std)
        with torch.inference_mode():
            out = detector(torch.from_numpy(pixels)[None], return_hidden=True)
            grid = out.clip_hidden[0, 1:].T.unflatten(1, (detector.clip.vision.grid,) * 2)
            patches = torch.nn.functional.adaptive_avg_pool2d(grid, GRID)
        columns["verdict"].append(detector.fake_probability(out.logits).numpy())
        columns["backbone"].append(out.pooled[0].numpy())
        columns["patches"].append(patches.flatten().numpy())
    features = {name: np.stack(column).astype(np.float64) for name, column in columns.items()}
    features["all three"] = np.concatenate(list(features.values()), axis=1)
    forged = np.array([kind_of(stem) != REAL for stem in stems])
    return Part(forged, np.stack([judged[stem] for stem in stems]) > 0, features)


def foretold(known: np.ndarray, targets: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Ridge regression with a penalty of one a sample: (N, F), (N, T), (M, F) to (M, T)."""
    middle, spread = known.mean(0), known.std(0) + 1e-6
    known, unknown = (known - middle) / spread, (unknown - middle) / spread
    kernel = known @ known.T + len(known) * np.eye(len(known))
    return unknown @ (known.T @ np.linalg.solve(kernel, targets - targets.mean(0)))


def interval(targets: np.ndarray, scores: np.ndarray) -> tuple[float, float, float]:
    """The mean AUC over targets, and its 95 % percentile bootstrap over pictures."""
    count = len(targets)
    draws = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    weights = np.stack([np.ones(count), *(np.bincount(draw, minlength=count) for draw in draws)])
    rankings = map(Ranking, targets.T, scores.T)
    # A draw that lacks a class has no AUC of that target.
    found = np.nanmean([area(ranking.curve(weights)) for ranking in rankings], axis=0)
    low, high = np.quantile(found[1:], (0.025, 0.975))
    return float(found[0]), float(low), float(high)


def test_what_features_tell_of_what_annotators_say():
    root = Path(os.environ["M2F2_DDVQA"])
    crops, annotations = root / "images" / "c40" / "train", root / "annotations" / "train"
    halves = split_by_identity(read_ddvqa(root), **HELD_OUT)
    learnt, held = (read(half.samples, crops, annotations) for half in halves)
    every = np.ones(len(learnt.said), bool), np.ones(len(held.said), bool)
    tasks = {
        "forged or real": (every, learnt.forged[:, None], held.forged[:, None]),
        "said, all": (every, learnt.said, held.said),
        "said, forged": ((learnt.forged, held.forged), learnt.said, held.said),
    }
    headings = (f"{name} ({rows[1].sum()})" for name, (rows, *_) in tasks.items())
    print("\n| features | " + " | ".join(headings) + " |")
    found = {}
    for name, known in learnt.features.items():
        for task, ((ours, theirs), told, truth) in tasks.items():
            scores = foretold(known[ours], told[ours], held.features[name][theirs])
            found[name, task] = interval(truth[theirs], scores)
        cells = ("{:.3f} ({:.3f}-{:.3f})".format(*found[name, task]) for task in tasks)
        print(f"| {name} | " + " | ".join(cells) + " |")
    assert found["backbone", "forged or real"][1] > 0.5, "these regressions see nothing at all"
