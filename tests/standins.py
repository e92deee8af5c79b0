"""Stand-ins for what a reader of the documents would bring, under the names that the pages use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
from PIL import Image

from m2f2cli.cli import app
from tests.conftest import write_detector
from tests.documents import ROOT
from tests.models.explainers import write_explainer

PEOPLE = 48  # half of them are held out: enough to calibrate on


def bring(folder: Path) -> Path:
    """Fill a folder: examples, photo.jpg, evidence/, clip.mp4, crops/, faces/, models, answers."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    photo = folder / "examples" / "astronaut.jpg"
    shutil.copy(photo, folder / "photo.jpg")
    shutil.copytree(folder / "examples", folder / "evidence", ignore=_no_pictures)
    face = Image.open(photo).convert("RGB").crop((150, 50, 310, 210))
    _write_clip(folder / "clip.mp4", Image.open(photo).convert("RGB"))
    for name in ("crops", "faces/real", "faces/fake"):
        (folder / name).mkdir(parents=True)
    draw = np.random.default_rng(0)
    for person in range(PEOPLE):
        left, top = draw.integers(0, 60, 2)
        crop = face.crop((left, top, left + 100, top + 100)).resize((64, 64))
        crop.save(folder / f"faces/real/p{person:03}.png")
        coarse = crop.resize((16, 16)).resize((64, 64), Image.Resampling.NEAREST)
        coarse.save(folder / f"faces/fake/p{person:03}.png")
    face.save(folder / "crops/one.jpg")
    _write_answers(folder)
    write_explainer(folder / "explainer")
    shutil.copytree(_trained(folder), folder / "my-detector")
    return folder


def _trained(folder: Path) -> Path:
    """A tiny detector, trained on half of ``faces/``."""
    write_detector(folder / "tiny")
    start = ["train-detector", "--model", str(folder / "tiny"), "--data", str(folder / "faces")]
    stop = ["--validation-share", "0.5", "--epochs", "1", "--quiet"]
    assert app.run([*start, *stop, "--output", str(folder / "detector")]) == 0
    return folder / "detector"


def _no_pictures(_: str, names: list[str]) -> list[str]:
    return [name for name in names if "." in name and not name.endswith(".jpg")]


def _write_clip(path: Path, picture: Image.Image) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 256, 256, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_image(picture.resize((256, 256)))))
        container.mux(stream.encode())


def _write_answers(folder: Path) -> None:
    """Ten judgements, nine of them right."""
    answers, labels = [], []
    for number in range(10):
        image, fake = f"{number}.jpg", number % 2
        word = "fake" if fake or number == 0 else "real"
        answers.append({"image": image, "prompt": "?", "text": f"The image is {word}."})
        labels.append({"image": image, "label": fake})
    for name, rows in (("answers", answers), ("labels", labels), ("truth", labels)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
