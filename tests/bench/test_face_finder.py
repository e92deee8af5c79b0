"""How many portraits the face finder finds, upright and turned: the row of ``docs/detect.md``.

Run with: FACES_DATA=FOLDER pytest tests/bench/test_face_finder.py -m bench -s

The folder holds ``test/{ffhq_stylegan2,ciplab,celebahq_real,studio_real}``: portraits of one person
each. Figures are taken once, after every choice has been made on other pictures.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from m2f2cli.data.faces import find_faces
from m2f2cli.data.images import read_picture
from m2f2cli.data.samples import list_files

SETS = ("ffhq_stylegan2", "ciplab", "celebahq_real", "studio_real")
TURNED = 8  # of so many pictures one is searched turned, too

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif("FACES_DATA" not in os.environ, reason="FACES_DATA is not set"),
]


def test_row_of_the_page():
    counts: dict[str, Counter[str]] = {name: Counter() for name in SETS}
    for name, count in counts.items():
        for number, path in enumerate(list_files(Path(os.environ["FACES_DATA"]) / "test" / name)):
            pixels = read_picture(path).pixels
            found = find_faces(pixels)
            count["pictures"] += 1
            count["found"] += bool(found)
            count["by dlib"] += bool(found) and found[0].finder == "dlib"
            count["several"] += len(found) > 1
            count["wrongly turned"] += bool(found) and found[0].turn != 0
            if number % TURNED == 0:
                turn = number // TURNED % 3 + 1
                found = find_faces(np.rot90(pixels, turn))
                count["turned"] += 1
                count["turned found"] += bool(found) and found[0].turn == 4 - turn
    print("\n| set | pictures | found | by dlib | several faces | of turned ones found |")
    print("|---|---|---|---|---|---|")
    for name, count in counts.items():
        found = f"{count['found']} ({count['found'] / count['pictures']:.1%})"
        print(
            f"| {name} | {count['pictures']} | {found} | {count['by dlib']} | {count['several']} "
            f"| {count['turned found']} of {count['turned']} |"
        )
    whole = sum(counts.values(), Counter())
    print(f"all: {whole['found'] / whole['pictures']:.2%}; {dict(whole)}")
    assert whole["found"] >= 0.99 * whole["pictures"]
