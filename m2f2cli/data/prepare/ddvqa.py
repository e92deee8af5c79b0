"""``m2f2 prepare ddvqa``: annotations and crops to conversations, test questions and truth.

Imports no torch.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    """What was found of one manipulation in one part."""

    part: str  # train or test
    kind: str  # real or the manipulation
    annotated: int  # pictures with answers
    pictures: int  # of these, how many have a crop
    answers: int  # about pictures with a crop
    no_crop: int  # annotated pictures whose crop is missing
    unreadable: int  # annotated pictures whose crop cannot be decoded


@dataclass(frozen=True)
class DdvqaReport:
    """What was written."""

    counts: list[PartCounts]  # by part and manipulation
    rows: dict[str, int]  # of each file
    unreadable: dict[str, str]  # the crops that cannot be decoded, with the reason
    unannotated: list[str]  # crops nobody spoke of; left out


class _Picture(NamedTuple):
    """One annotated crop."""

    stem: str
    kind: str
    sha256: str
    answers: tuple[Answer, ...]

    @property
    def verdict(self) -> str:
        return REAL if self.kind == REAL else "fake"


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
    report = DdvqaReport([], {}, {}, [])
    train, test = (_read_part(root, part, report) for part in ("train", "test"))
    judge = [_row(one, explanations.judge_turns(one.verdict)) for one in train for _ in one.answers]
    explain = [
        _row(one, turns)
        for one in train
        for answer in one.answers
        for turns in explanations.explain_turns(answer, one.verdict)
    ]
    for rows in (judge, explain):
        random.Random(seed).shuffle(rows)
    questions = [
        {
            f"{one.stem}_{number}": {
                "question": explanations.test_question(answer, one.verdict),
                "answer": [explanations.reasons(answer)],
                "sha256": one.sha256,
            }
        }
        for one in test
        for number, answer in enumerate(one.answers)
    ]
    truth = [
        {
            "name": f"{one.stem}.jpg",
            "label": one.verdict,
            "kind": one.kind,
            "video": one.stem,
            "sha256": one.sha256,
        }
        for one in test
    ]
    made: dict[str, list[dict[str, Any]]] = dict(
        zip(FILES, (judge, explain, questions, truth), strict=True)
    )
    encoded = {name: _encode(rows, lines=name.endswith("l")) for name, rows in made.items()}
    for name, data in encoded.items():
        path = output / name
        if path.exists() and not overwrite and path.read_bytes() != data:
            raise UsageError(
                f"'{path}' is there already and differs.",
                "Add --overwrite, or choose another --output.",
            )
    for name, data in encoded.items():
        atomic_write(output / name, data)
    report.rows.update((name, len(rows)) for name, rows in made.items())
    return report


def _read_part(root: Path, part: str, report: DdvqaReport) -> list[_Picture]:
    """The annotated crops of a part; what was found is added to the report."""
    annotations = read_annotations(root / "annotations" / part)
    crops = root / "images" / "c40" / part
    if not crops.is_dir():
        raise InputError(
            f"There is no folder of crops '{crops}'.", "missing", "Name the folder that holds it."
        )
    found = []
    annotated, no_crop, unreadable = Counter[str](), Counter[str](), Counter[str]()
    for stem, answers in annotations.items():
        kind = str(kind_of(stem))
        annotated[kind] += 1
        path = crops / f"{stem}.jpg"
        if not path.exists():
            no_crop[kind] += 1
            continue
        try:
            found.append(_Picture(stem, kind, read_picture(path).sha256, answers))
        except InputError as error:
            unreadable[kind] += 1
            report.unreadable[path.name] = error.message
    if not found:
        raise InputError(f"No annotated picture has a crop in '{crops}'.", "empty")
    for kind in sorted(annotated, key=lambda kind: (kind != REAL, kind)):
        said = [len(one.answers) for one in found if one.kind == kind]
        lost = no_crop[kind], unreadable[kind]
        report.counts.append(PartCounts(part, kind, annotated[kind], len(said), sum(said), *lost))
    names = (path.name for path in sorted(crops.iterdir()) if path.stem not in annotations)
    report.unannotated.extend(f"{part}/{name}" for name in names)
    return found


def _row(picture: _Picture, turns: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "id": picture.stem[2:],
        "image": f"{picture.stem}.jpg",
        "sha256": picture.sha256,
        "conversations": turns,
    }


def _encode(rows: Sequence[Mapping[str, Any]], *, lines: bool) -> bytes:
    """As JSON Lines, or as one JSON list as the published files have it."""
    if lines:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    return (json.dumps(rows, ensure_ascii=False, indent=4) + "\n").encode()
