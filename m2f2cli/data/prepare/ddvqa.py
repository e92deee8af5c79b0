"""``m2f2 prepare ddvqa``: annotations and crops to conversations, test questions and truth.

Imports no torch.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2f2cli.data.images import read_picture
from m2f2cli.data.prepare import explanations
from m2f2cli.data.readers.ddvqa import Answer, read_annotations
from m2f2cli.data.samples import REAL, kind_of
from m2f2cli.errors import InputError, UsageError
from m2f2cli.files import atomic_write

JUDGE_FILE = "train_judge_only_c40.json"
EXPLAIN_FILE = "train_explain_c40.json"
QUESTIONS_FILE = "test_c40.jsonl"
TRUTH_FILE = "truth_test_c40.jsonl"
FILES = (JUDGE_FILE, EXPLAIN_FILE, QUESTIONS_FILE, TRUTH_FILE)


@dataclass(frozen=True)
class PartCounts:
    """What was found of one manipulation in one part.

    Attributes:
        part: ``train`` or ``test``.
        kind: ``real`` or the manipulation.
        annotated: Pictures with answers.
        pictures: Of these, how many have a crop.
        answers: About pictures with a crop.
        no_crop: Annotated pictures whose crop is missing.
        unreadable: Annotated pictures whose crop cannot be decoded.
    """

    part: str
    kind: str
    annotated: int
    pictures: int
    answers: int
    no_crop: int
    unreadable: int


@dataclass(frozen=True)
class DdvqaReport:
    """What was written.

    Attributes:
        counts: By part and manipulation.
        rows: Of each file.
        unreadable: The crops that cannot be decoded, with the reason.
        unannotated: Crops nobody spoke of; left out.
    """

    counts: tuple[PartCounts, ...]
    rows: Mapping[str, int]
    unreadable: Mapping[str, str]
    unannotated: tuple[str, ...]


@dataclass(frozen=True)
class _Picture:
    """One annotated crop."""

    stem: str
    sha256: str
    answers: tuple[Answer, ...]

    @property
    def verdict(self) -> str:
        return REAL if kind_of(self.stem) == REAL else "fake"

    @property
    def video(self) -> str:
        return self.stem[2:]


def prepare_ddvqa(
    root: Path, output: Path, *, seed: int = 0, overwrite: bool = False
) -> DdvqaReport:
    """Write the files of ``FILES``: the same bytes for the same input and seed.

    Args:
        root: The data set: ``annotations/{train,test}`` and ``images/c40/{train,test}``.
        output: Folder to write into; made when missing.
        seed: Decides the order of the training conversations.
        overwrite: Replace files that are there and differ.

    Raises:
        UsageError: A file is there already and differs.
        InputError: A part is missing, malformed, or has no crops at all.
        CheckpointError: A file cannot be written.
    """
    counts: list[PartCounts] = []
    unreadable: dict[str, str] = {}
    unannotated: list[str] = []
    parts = {}
    for part in ("train", "test"):
        annotations = read_annotations(root / "annotations" / part)
        crops = root / "images" / "c40" / part
        pictures = parts[part] = _with_crops(annotations, crops, unreadable)
        counts += _count(part, annotations, pictures, crops)
        unannotated += [
            f"{part}/{path.name}"
            for path in sorted(crops.iterdir())
            if path.stem not in annotations
        ]
    train, test = parts["train"], parts["test"]
    judge = [_row(one, explanations.judge_turns(one.verdict)) for one in train for _ in one.answers]
    explain = [
        _row(one, turns)
        for one in train
        for answer in one.answers
        for turns in explanations.explain_turns(answer, one.verdict)
    ]
    for rows in (judge, explain):
        random.Random(seed).shuffle(rows)
    questions = [_question(one, *numbered) for one in test for numbered in enumerate(one.answers)]
    truth = [_truth(one) for one in test]
    encoded = (_json(judge), _json(explain), _lines(questions), _lines(truth))
    _write(output, dict(zip(FILES, encoded, strict=True)), overwrite)
    lengths = dict(zip(FILES, map(len, (judge, explain, questions, truth)), strict=True))
    return DdvqaReport(tuple(counts), lengths, unreadable, tuple(unannotated))


def _write(output: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    for name, data in files.items():
        path = output / name
        if path.exists() and not overwrite and path.read_bytes() != data:
            raise UsageError(
                f"'{path}' is there already and differs.",
                "Add --overwrite, or choose another --output.",
            )
    for name, data in files.items():
        atomic_write(output / name, data)


def _with_crops(
    annotations: Mapping[str, tuple[Answer, ...]], crops: Path, unreadable: dict[str, str]
) -> list[_Picture]:
    if not crops.is_dir():
        raise InputError(
            f"There is no folder of crops '{crops}'.", "missing", "Name the folder that holds it."
        )
    found = []
    for stem, answers in annotations.items():
        path = crops / f"{stem}.jpg"
        if not path.exists():
            continue
        try:
            found.append(_Picture(stem, read_picture(path).sha256, answers))
        except InputError as error:
            unreadable[path.name] = error.message
    if not found:
        raise InputError(f"No annotated picture has a crop in '{crops}'.", "empty")
    return found


def _count(
    part: str,
    annotations: Mapping[str, tuple[Answer, ...]],
    pictures: Sequence[_Picture],
    crops: Path,
) -> list[PartCounts]:
    annotated = Counter(kind_of(stem) for stem in annotations)
    usable = Counter(kind_of(one.stem) for one in pictures)
    missing = Counter(kind_of(s) for s in annotations if not (crops / f"{s}.jpg").exists())
    answers: Counter[str | None] = Counter()
    for one in pictures:
        answers[kind_of(one.stem)] += len(one.answers)
    return [
        PartCounts(
            part,
            str(kind),
            annotated[kind],
            usable[kind],
            answers[kind],
            missing[kind],
            annotated[kind] - usable[kind] - missing[kind],
        )
        for kind in sorted(annotated, key=lambda kind: (kind != REAL, str(kind)))
    ]


def _row(picture: _Picture, turns: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "id": picture.video,
        "image": f"{picture.stem}.jpg",
        "sha256": picture.sha256,
        "conversations": turns,
    }


def _question(picture: _Picture, number: int, answer: Answer) -> dict[str, Any]:
    entry = {
        "question": explanations.test_question(answer, picture.verdict),
        "answer": [explanations.reasons(answer)],
        "sha256": picture.sha256,
    }
    return {f"{picture.stem}_{number}": entry}


def _truth(picture: _Picture) -> dict[str, Any]:
    return {
        "name": f"{picture.stem}.jpg",
        "label": picture.verdict,
        "kind": kind_of(picture.stem),
        "video": picture.stem,
        "sha256": picture.sha256,
    }


def _json(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return (json.dumps(rows, ensure_ascii=False, indent=4) + "\n").encode()


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
