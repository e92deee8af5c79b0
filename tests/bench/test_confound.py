"""Whether real and forged pictures of a set differ by their files alone: size, JPEG tables, bytes.

Run with: M2F2_DDVQA=FOLDER M2F2_FACES=FOLDER pytest tests/bench/test_confound.py -m bench -s

For each set a logistic regression on the size of the file, the size of the picture and the JPEG
quantization tables is cross-validated between people; no pixel is looked at. A set on which it is
better than chance flatters every detector. It is repeated without the size of the file, and on the
pictures at one size and JPEG quality, where only the size of the file can still differ: what is
left there is how smooth the pictures are, which is a property of their content. By default the sets
are DD-VQA's training crops and the folders below ``val`` of M2F2_FACES; CONFOUND_DATA names others,
with colons between.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f2cli.data.images import read_picture
from m2f2cli.data.samples import SampleSet, identity_groups, read_samples
from m2f2cli.metrics import Groups, Ranking, area, interval, resample, roc_auc

SIDE, QUALITY = 224, 85  # of the pictures made equal
FOLDS, BINS, RIDGE = 5, 8, 1.0
TABLES, ENTRIES = 2, 64
OF_BYTES = 2  # facts that the size of the file takes part in, the first ones


def sets() -> dict[str, SampleSet]:
    if named := os.environ.get("CONFOUND_DATA"):
        folders = named.split(":")
    else:
        folders = []
        if "FACES_DATA" in os.environ:
            folders += sorted(map(str, Path(os.environ["FACES_DATA"], "val").iterdir()))
        if "M2F2_DDVQA" in os.environ:
            folders.append(f"{os.environ['M2F2_DDVQA']}/images/c40/train")
    found = {}
    for folder in folders:
        people = Path(folder) / "identities.csv"
        found[folder] = read_samples(folder, people if people.is_file() else None)
    return found


def of_file(data: bytes) -> list[float]:
    """What is known of a file without looking at its pixels."""
    with Image.open(io.BytesIO(data)) as picture:
        width, height = picture.size
        tables = getattr(picture, "quantization", {})
    facts = [len(data), len(data) / (width * height)]  # OF_BYTES of them
    facts += [width, height, width / height, len(tables)]
    for number in range(TABLES):
        facts += list(tables.get(number, [0] * ENTRIES))
    return facts


def equalized(path: Path) -> bytes:
    """The picture at one size and JPEG quality."""
    picture = Image.fromarray(read_picture(path).pixels).resize((SIDE, SIDE))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=QUALITY)
    return data.getvalue()


def binned(facts: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Each fact as membership of the bins that its quantiles among the known ones make."""
    columns = [np.ones(len(facts))]
    for fact, own in zip(facts.T, known.T, strict=True):
        edges = np.unique(np.quantile(own, np.linspace(0, 1, BINS + 1)[1:-1]))
        place = np.searchsorted(edges, fact, side="right")
        columns += [place == bin for bin in range(1, len(edges) + 1)]
    return np.stack(columns, axis=1).astype(np.float64)


def fitted(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights of a ridge logistic regression, by Newton's method."""
    weights = np.zeros(x.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        slope = x.T @ (p - y) + RIDGE * weights
        bend = (x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(x.shape[1])
        step = np.linalg.solve(bend, slope)
        weights -= step
        if np.abs(step).max() < 1e-6:
            break
    return weights


def scores(facts: np.ndarray, labels: np.ndarray, people: list[list[int]]) -> np.ndarray:
    """Log-odds of being forged, each by a classifier that saw nobody in the picture."""
    order = np.random.default_rng(0).permutation(len(people))
    fold = np.empty(len(labels), dtype=int)
    for place, number in enumerate(order):
        fold[people[number]] = place % FOLDS
    found = np.empty(len(labels))
    for number in range(FOLDS):
        seen, held = fold != number, fold == number
        weights = fitted(binned(facts[seen], facts[seen]), labels[seen])
        found[held] = binned(facts[held], facts[seen]) @ weights
        found[held] -= np.median(found[held])  # folds differ in their intercept
    return found


def measured(facts: list[list[float]], samples: SampleSet) -> tuple[float, float, float]:
    labels = samples.labels()
    people = identity_groups(samples.samples)
    found = scores(np.array(facts), labels, people)
    names = np.empty(len(labels), dtype=object)
    for number, members in enumerate(people):
        names[members] = str(number)
    groups = Groups(names.tolist(), labels.tolist())
    ranking = Ranking(labels, found, groups.of_item)
    drawn = resample(groups, lambda weights: {"auc": area(ranking.curve(weights))})
    low, high = interval(drawn["auc"]) or (float("nan"), float("nan"))
    return roc_auc(labels, found), low, high


def test_the_classifier_finds_what_tables_tell_and_nothing_where_nothing_is():
    rng = np.random.default_rng(1)
    labels = np.arange(400) % 2
    people = [[n, n + 1] for n in range(0, 400, 2)]
    pixels = rng.integers(0, 255, (400, 8, 8, 3), dtype=np.uint8)
    told, silent = [], []
    for picture, label in zip(pixels, labels, strict=True):
        for facts, quality in ((told, 70 + 20 * label), (silent, 80)):
            data = io.BytesIO()
            Image.fromarray(picture).save(data, "JPEG", quality=int(quality))
            facts.append(of_file(data.getvalue()))
    assert roc_auc(labels, scores(np.array(told), labels, people)) > 0.99
    assert 0.4 < roc_auc(labels, scores(np.array(silent), labels, people)) < 0.6


@pytest.mark.bench
@pytest.mark.skipif(
    not {"CONFOUND_DATA", "FACES_DATA", "M2F2_DDVQA"} & set(os.environ), reason="no data is named"
)
def test_table_of_the_sets():
    print(
        "\n| set | real | forged | files as they are | tables and picture size alone "
        "| one size and quality |"
    )
    print("|---|---|---|---|---|---|")
    for name, samples in sets().items():
        cells = []
        paths = [sample.path for sample in samples.samples]
        as_is, equal = (
            [of_file(read(path)) for path in paths] for read in (Path.read_bytes, equalized)
        )
        for facts in (as_is, [row[OF_BYTES:] for row in as_is], equal):
            value, low, high = measured(facts, samples)
            cells.append(f"{value:.3f} ({low:.3f}–{high:.3f})")
        fakes = int(samples.labels().sum())
        print(f"| {name} | {len(samples) - fakes} | {fakes} | {' | '.join(cells)} |")
