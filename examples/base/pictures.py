"""The pictures that the detector learns from: labels, hold-outs, random draws.

FACES is a folder with ``manifest.csv`` (file, label, dataset, identity) and the pictures of DFDC
and of FFHQ and StyleGAN; DDVQA the folder of DD-VQA. Who is held out: of DFDC whole actors
(``actors.py``), of the others an identity by a hash. ``select`` pictures choose between recipes
and calibrate, ``report`` pictures are measured once. Compression and size are drawn alike for both
classes.
"""

from __future__ import annotations

import csv
import io
import json
import random
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from m2f2cli.data.augment import compress_h264
from m2f2cli.data.synthesis import Forgery, forge

KINDS = ("swapped or edited", "generated")
SIDE = 224
DRAWS = {"dfdc": 3, "faces140k": 6, "ddvqa": 6}  # of a training picture
FORGERIES = {"train": 6000, "select": 600}  # pseudo-forgeries of genuine pictures
FORGED_OF = ("dfdc", "faces140k", "faces140k", "ddvqa")  # drawn from
_FORGERIES = ("self_blend", "swap_blend", "swap_blend", "mouth_warp", "expression_warp")
_FILTERS = [Image.Resampling[n] for n in ("BILINEAR", "BICUBIC", "LANCZOS", "BOX")]


class Picture(NamedTuple):
    """``kind`` is 0 of a real one, else from 1 in ``KINDS``; ``split`` one of four words."""

    path: Path
    source: str
    kind: int
    split: str


def read_pictures(faces: Path, ddvqa: Path, actors: Path) -> list[Picture]:
    """All pictures of the training and validation folders; ``actors`` is what actors.py wrote."""
    by_actor = json.loads(actors.read_text())
    found = []
    for row in csv.DictReader((faces / "manifest.csv").open()):
        name, source = row["file"], row["dataset"]
        if name.startswith(("train/", "val/")):
            split = by_actor[name] if source == "dfdc" else _by_hash(row["identity"], 12)
            kind = 2 if source == "faces140k" else 1
            found.append(Picture(faces / name, source, kind * (row["label"] == "fake"), split))
    return found + read_crops(ddvqa)


def read_crops(ddvqa: Path) -> list[Picture]:
    """DD-VQA's training crops. Two people swap faces with each other, so a pair stays together."""
    found = []
    crops = sorted((ddvqa / "images" / "c40" / "train").glob("*.jpg"))
    names = [path.stem.split("_") for path in crops]
    pairs = {person: min(people) for _, *people in names if people[1:] for person in people}
    for path, (manipulation, person, *_) in zip(crops, names, strict=True):
        split = _by_hash(pairs.get(person, person), 15)
        found.append(Picture(path, "ddvqa", int(manipulation != "5"), split))
    return found


class Draw(NamedTuple):
    """One random draw of a picture, or of a pseudo-forgery made of it and another genuine one.

    The seed makes it the same again.
    """

    picture: Picture
    seed: str
    other: Picture | None = None

    @property
    def kind(self) -> int:
        """As a picture's."""
        return 1 if self.other else self.picture.kind

    @property
    def source(self) -> str:
        """As a picture's, or "forged"."""
        return "forged" if self.other else self.picture.source

    def pixels(self) -> np.ndarray:
        """uint8 (224, 224, 3)."""
        rng, picture = random.Random(self.seed), load(self.picture.path)
        if self.other:
            picture = Image.fromarray(_forged(self.picture, self.other, rng).pixels)
        return draw(picture, self.picture.source, rng)


def list_draws(pictures: list[Picture]) -> list[Draw]:
    """DRAWS of every training picture, one of what is held out, shuffled; then FORGERIES."""
    found = []
    for number, picture in enumerate(p for p in pictures if p.split != "drop"):
        draws = DRAWS[picture.source] if picture.split == "train" else 1
        found += [Draw(picture, f"{number} {count}") for count in range(draws)]
    rng = random.Random(0)
    rng.shuffle(found)
    for split, count in FORGERIES.items():
        genuine = {
            source: [p for p in pictures if (p.source, p.split, p.kind) == (source, split, 0)]
            for source in set(FORGED_OF)
        }
        for number in range(count):
            first, second = rng.sample(genuine[rng.choice(FORGED_OF)], 2)
            found.append(Draw(first, f"{split} {number}", second))
    return found


def _by_hash(identity: str, percent: int) -> str:
    return "select" if zlib.crc32(identity.encode()) % 100 < percent else "train"


def load(path: Path) -> Image.Image:
    """A picture in RGB."""
    return Image.open(path).convert("RGB")


def draw(picture: Image.Image, source: str, rng: random.Random) -> np.ndarray:
    """A random crop, mirrored, resized and compressed: uint8 (224, 224, 3).

    Pictures of faces140k show the whole head, so their crops are smaller.
    """
    if rng.random() < 0.12:
        edge = rng.randint(120, 300)
        if rng.random() < 0.5:
            picture = picture.resize((edge, edge), Image.Resampling.BICUBIC)
        pixels = compress_h264(np.asarray(picture), rng.randint(20, 40))
        picture = Image.fromarray(pixels)
    low, high = (0.6, 0.95) if source == "faces140k" else (0.8, 1.0)
    width, height = picture.size
    side = rng.uniform(low, high) * min(width, height)
    across = min(width, side * rng.uniform(1, 1.1))
    down = min(height, side * rng.uniform(1, 1.1))
    left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
    box = (int(left), int(top), int(left + across), int(top + down))
    picture = picture.crop(box)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for _ in range(rng.choice((0, 1, 1, 2))):
        if rng.random() < 0.6:
            edge = rng.randint(80, 320)
            picture = picture.resize((edge, edge), rng.choice(_FILTERS))
        if rng.random() < 0.08:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
        if rng.random() < 0.85:
            picture = _jpeg(picture, rng.randint(30, 95), rng.choice((0, 2, 2)))
    pixels = np.asarray(picture.resize((SIDE, SIDE), rng.choice(_FILTERS[:3])), np.float32)
    if rng.random() < 0.3:
        pixels = pixels * rng.uniform(0.85, 1.15) + rng.uniform(-15, 15)
    if rng.random() < 0.08:
        noise = np.random.default_rng(rng.randint(0, 2**31))
        pixels = pixels + noise.normal(0, rng.uniform(1, 5), pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def draw_forgery(
    base: Picture, other: Picture, rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """A pseudo-forgery made of two genuine pictures, and its mask: (224, 224, 3), (224, 224).

    The mask is float32 in [0, 1]; nothing is cropped, so it stays where it was.
    """
    made = _forged(base, other, rng)
    picture = Image.fromarray(made.pixels)
    if rng.random() < 0.85:
        picture = _jpeg(picture, rng.randint(30, 95), rng.choice((0, 2, 2)))
    if rng.random() < 0.6:
        edge = rng.randint(80, 320)
        picture = picture.resize((edge, edge), rng.choice(_FILTERS))
    pixels = np.asarray(picture.resize((SIDE, SIDE), rng.choice(_FILTERS[:3])))
    mask = Image.fromarray(made.mask.astype(np.float32)).resize((SIDE, SIDE))
    return pixels, np.asarray(mask)


def _forged(base: Picture, other: Picture, rng: random.Random) -> Forgery:
    edge = (256, 256)
    first, second = (np.asarray(load(p.path).resize(edge, _FILTERS[2])) for p in (base, other))
    numbers = np.random.default_rng(rng.randint(0, 2**31))
    return forge(first, numbers, kind=rng.choice(_FORGERIES), other=second)


def _jpeg(picture: Image.Image, quality: int, subsampling: int) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality, subsampling=subsampling)
    return load(stream)  # type: ignore[arg-type]
