"""Calibrate a detector on the held-out people, judged as ``m2f2 detect`` judges pictures.

    python examples/base/calibrate.py FACES DDVQA ACTORS.json DETECTOR

Writes temperature, threshold, uncertain band and whether kinds are named into its config.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from m2f2cli.runtime import cure_torchvision

cure_torchvision()

import numpy as np  # noqa: E402
from pictures import KINDS, read_pictures  # noqa: E402

from m2f2cli import detect  # noqa: E402
from m2f2cli.evaluation.calibrate import find_threshold, fit  # noqa: E402
from m2f2cli.files import json_bytes  # noqa: E402
from m2f2cli.metrics import log_odds, roc_auc  # noqa: E402

GENUINE_CALLED_FAKE = 0.05  # of any source, at most
UNDECIDED = 0.2  # of pictures of which every source and class is as many as another
RIGHTLY_NAMED = 0.95  # of the forged pictures found, or no kind is named
DRAWN = 500  # pictures of a source and class, drawn with replacement
UNCALIBRATED = {"score_temperature": 1.0, "threshold": 0.5, "uncertain": None, "kind_margin": 0.0}


def update(folder: Path, fields: dict[str, object]) -> None:
    """Change fields of a checkpoint's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_bytes(json_bytes(config | fields))


def main(faces: Path, ddvqa: Path, actors: Path, folder: Path) -> None:
    """Judge, choose, write, and print what the held-out people get of it."""
    update(folder, UNCALIBRATED)
    pictures = [p for p in read_pictures(faces, ddvqa, actors) if p.split == "select"]
    records = list(detect([str(p.path) for p in pictures], model=str(folder)))
    judged = [(p, r) for p, r in zip(pictures, records, strict=True) if r.status == "ok"]
    print(f"{len(judged)} of {len(pictures)} judged")
    source = np.array([p.source for p, _ in judged])
    kind = np.array([p.kind for p, _ in judged])
    named = np.array([r.forgery == KINDS[p.kind - 1] for p, r in judged])
    score = np.array([r.fake_probability for _, r in judged])
    fake, rng = kind > 0, np.random.default_rng(0)
    parts = [
        np.flatnonzero((source == s) & (fake == word))
        for s in np.unique(source)
        for word in (False, True)
    ]
    mixed = np.concatenate([rng.choice(part, DRAWN) for part in parts])
    temperature = fit(fake[mixed].astype(int), score[mixed], band_level=0).temperature
    score = np.round(1 / (1 + np.exp(-log_odds(score) / temperature)), 6)
    threshold = max(
        find_threshold(score[source == s], ~fake[source == s], GENUINE_CALLED_FAKE)
        for s in np.unique(source)
    )
    called_real = float((score[mixed] < threshold).mean()) - UNDECIDED
    low = round(float(np.quantile(score[mixed], max(called_real, 0))), 6)
    found = fake & (score >= threshold)
    fields = {
        "score_temperature": temperature,
        "threshold": threshold,
        "uncertain": [low, round(threshold - 1e-6, 6)],
        "kind_margin": 0.0 if named[found].mean() >= RIGHTLY_NAMED else None,
    }
    update(folder, fields)
    print(fields, f"{named[found].mean():.3f} of the forged pictures found are named rightly")
    undecided = (score >= low) & (score < threshold)
    wrong = (fake & (score < low)) | (~fake & (score >= threshold))
    for s in np.unique(source):
        here = source == s
        figures = {
            "AUC": roc_auc(fake[here].astype(int), score[here]),
            "genuine called fake": (score[here & ~fake] >= threshold).mean(),
            "forged called fake": (score[here & fake] >= threshold).mean(),
            "undecided": undecided[here].mean(),
            "decided rightly": 1 - wrong[here & ~undecided].mean(),
        }
        print(s, {word: round(float(value), 4) for word, value in figures.items()})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
