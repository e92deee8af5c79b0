"""A detector of one's own from a thousand pictures: how long it takes and what it is worth.

Run with: M2F2_DDVQA=FOLDER M2F2_FACES=FOLDER pytest tests/bench/test_own_detector.py -m bench -s

500 pictures each of DFDC and of FFHQ and StyleGAN, half of them forged; measured on 2,000 DFDC
pictures of other videos and on DD-VQA's training crops, a source that is not in the thousand.
BEFORE=FOLDER is a checkout of an earlier version, whose ``--init lite`` is run for EPOCHS (2)
epochs of its 200 at the end. MODELS names what ours starts from.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

NEEDED = {"M2F2_DDVQA", "FACES_DATA"}
pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(not set(os.environ) >= NEEDED, reason="not all data is named"),
]
MODELS = os.environ.get("MODELS", "lite").split()
PART = 250  # pictures of a source and class


def thousand(folder: Path) -> Path:
    """Links below ``real`` and ``fake``, and the videos they come from."""
    faces = Path(os.environ["FACES_DATA"])
    rows = [r for r in csv.DictReader((faces / "manifest.csv").open()) if r["file"][:5] == "train"]
    people = ["name,identity"]
    for source in ("dfdc", "faces140k"):
        for label in ("real", "fake"):
            some = [r for r in rows if (r["dataset"], r["label"]) == (source, label)]
            for row in random.Random(0).sample(some, PART):
                link = folder / label / f"{source}_{Path(row['file']).name}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(faces / row["file"])
                people.append(f"{label}/{link.name},{row['identity']}")
    (folder / "identities.csv").write_text("\n".join(people) + "\n")
    return folder


def run(*words: object, source: Path | None = None) -> tuple[float, str]:
    """Seconds and what it says, of this version or of the checkout ``source``."""
    command = [sys.executable, "-m", "m2f2cli", *map(str, words)]
    environment = {**os.environ} | ({"PYTHONPATH": str(source)} if source else {})
    began = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=source, check=False
    )
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - began, done.stdout + done.stderr


def auc(data: str, model: Path) -> str:
    _, said = run("evaluate", "images", data, "--model", model, "--faces", "none", "--json")
    figure = json.loads(said[said.index("{") : said.rindex("}") + 1])["figures"]["auc"]
    return f"{figure['value']:.3f} ({figure['low']:.3f}–{figure['high']:.3f})"


def test_table(tmp_path):
    data = thousand(tmp_path / "faces")
    with_people = ("--data", data, "--identities", data / "identities.csv")
    held = {
        "DFDC, other videos": f"{os.environ['FACES_DATA']}/val/dfdc",
        "DD-VQA, not in the thousand": f"ddvqa:{os.environ['M2F2_DDVQA']}/images/c40/train",
    }
    print(f"\n| from | seconds | {' | '.join(held)} |\n|---|---|---|---|")
    for model in MODELS:
        output = tmp_path / model
        seconds, said = run("train-detector", *with_people, "--model", model, "--output", output)
        figures = " | ".join(auc(folder, output) for folder in held.values())
        print(f"| {model} | {seconds:.0f} | {figures} |", flush=True)
        print(*re.findall(r".*epoch \d+/\d+.*", said), sep="\n")
    if before := os.environ.get("BEFORE"):
        epochs = int(os.environ.get("EPOCHS", "2"))
        output = tmp_path / "before"
        words = (*with_people, "--init", "lite", "--epochs", epochs, "--output", output)
        seconds, _ = run("train-detector", *words, source=Path(before))
        figures = " | ".join(auc(folder, output) for folder in held.values())
        print(f"| before, {epochs} epochs of 200 | {seconds:.0f} | {figures} |")
