"""DD-VQA face crops: which manipulation and who from their names, what people saw from annotations.

Source: DD-VQA (ECCV 2024) over FaceForensics++ crops, as the published system lays them out:
``images/c40/{train,test}/<manipulation>_<video>.jpg`` and ``annotations/<part>/<kind>/*.json``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from m2f2cli.data.samples import (
    DDVQA_CROPS,
    DDVQA_NAME,
    REAL,
    Sample,
    SampleSet,
    kind_of,
    list_files,
    people_in,
)
from m2f2cli.errors import InputError
from m2f2cli.files import parse_json

T = TypeVar("T")
REGIONS = ("skin", "eyebrows", "eyes", "nose", "mouth")
# Flaws that annotators name, and the words that tell.
FLAWS = {
    "boundary": "boundar",
    "blur": "blurry",
    "smoothness": "smooth",
    "asymmetry": "asymmetric",
    "stain": "stain|flaw",
    "brightness": "brighter|darker",
    "misalignment": "misalign|align|placed at the wrong",
    "curvature": "curved",
    "mismatch": "mismatch",
}

_ASKED = re.compile(
    r"Does the image looks real/fake\?"
    rf"|Do(?:es)? the person's (?P<region>{'|'.join(REGIONS)}) look real/fake\?"
)
_OPENING = re.compile(r"(?:The image looks|The person's \w+ looks?) (?P<verdict>real|fake)\.\s*")


def read_ddvqa(root: Path) -> SampleSet:
    """Read DD-VQA crops.

    Args:
        root: The data set's folder, whose ``images/c40/train`` is then read, or a folder of crops.

    Raises:
        InputError: There are no crops, or one is not named as DD-VQA names them.
    """
    crops = root / DDVQA_CROPS / "train"
    folder = crops if crops.is_dir() else root
    samples = []
    for path in list_files(folder):
        kind = kind_of(path.name)
        if kind is None:
            raise InputError(
                f"'{path}' is not named like a DD-VQA crop (0_005_010.jpg, 5_012.jpg).",
                hint="Move it away, or sort the pictures into real/ and fake/.",
            )
        name = path.relative_to(folder).as_posix()
        samples.append(Sample(path, name, int(kind != REAL), kind, people_in(path.stem[2:])))
    if not samples:
        raise InputError(f"There are no DD-VQA crops in '{folder}'.", "empty")
    return SampleSet(folder, "ddvqa", tuple(samples))


@dataclass(frozen=True)
class Answer:
    """What one annotator said to one question about a picture."""

    region: str | None  # one of REGIONS; None where the question was about the whole picture
    text: str  # the annotator's words, which begin with a verdict


def _read_files(folder: Path, read: Callable[[str, dict[str, Any]], T | None]) -> dict[str, T]:
    """What ``read`` makes of each picture's name and questions, where that is not None."""
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise InputError(f"There are no annotation files (*.json) in '{folder}'.", "empty")
    found: dict[str, T] = {}
    for file in files:
        try:
            for stem, questions in parse_json(file.read_text(encoding="utf-8-sig")).items():
                value = read(stem, questions)
                if value is None:
                    continue
                if stem in found:
                    raise ValueError(f"'{stem}' is annotated twice")
                found[stem] = value
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"'{file}' is not a DD-VQA annotation file: {type(error).__name__} {error}."
            ) from error
    return found


def read_annotations(folder: Path) -> dict[str, tuple[Answer, ...]]:
    """Read every answer about every picture, in the order of the files.

    Args:
        folder: Annotation JSON files, sub-folders included: ``{"0_005_010": {"0": {"question",
            "answer": [...]}}}``.

    Returns:
        The answers by the picture's file name without suffix.

    Raises:
        InputError: There are no annotation files, one is malformed, or two speak of one picture.
    """
    return _read_files(folder, lambda stem, questions: tuple(_answers(stem, questions)))


def _answers(stem: str, questions: dict[str, Any]) -> Iterator[Answer]:
    if not DDVQA_NAME.fullmatch(stem):
        raise ValueError(f"'{stem}' is not named like a DD-VQA crop")
    for entry in questions.values():
        asked = _ASKED.fullmatch(entry["question"])
        if asked is None or not isinstance(entry["answer"], list):
            raise ValueError(f"'{stem}' has an unknown question, {entry['question']!r}")
        for text in entry["answer"]:
            verdict = _OPENING.match(text)
            if verdict is None or (verdict["verdict"] == "real") != (kind_of(stem) == REAL):
                raise ValueError(f"an answer about '{stem}' does not begin with its verdict")
            yield Answer(asked["region"], text)


def without_verdict(text: str) -> str:
    """An answer without the sentence it opens with (``The image looks fake.``)."""
    return _OPENING.sub("", text, count=1)


def read_judgements(folder: Path, stems: Iterable[str]) -> dict[str, np.ndarray]:
    """Read what annotators saw in pictures.

    Args:
        folder: As for ``read_annotations``.
        stems: File names without suffix to look for.

    Returns:
        For each stem that is annotated, float32 (14,), the largest over its answers. In the order
        of ``REGIONS``: 0 looks real or is not spoken of, 0.5 looks a bit fake, 1 looks very fake
        (or fake, with no degree said). Then in the order of ``FLAWS``: 1 if named, else 0.

    Raises:
        InputError: As ``read_annotations``.
    """
    wanted = set(stems)
    return _read_files(folder, lambda stem, entries: _judge(entries) if stem in wanted else None)


def _judge(questions: dict[str, Any]) -> np.ndarray:
    text = " ".join(answer for entry in questions.values() for answer in entry["answer"]).lower()
    severities = []
    for region in REGIONS:
        degrees = set(re.findall(rf"\b{region} looks? (very |a bit |slightly |)fake", text))
        # Every judgement opens with a bare "looks fake"; a degree follows mostly.
        severities.append(1.0 if "very " in degrees or degrees == {""} else 0.5 * bool(degrees))
    named = [float(re.search(words, text) is not None) for words in FLAWS.values()]
    return np.array([*severities, *named], dtype=np.float32)
