"""What is true of each picture or question, read from files; from file names only when asked.

The labels of a folder of pictures and of HDF5 files come from ``evaluation.runs.truth_of``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2f2cli.data.judgement import stated_label
from m2f2cli.errors import InputError, UsageError
from m2f2cli.evaluation.predictions import (
    BadRow,
    Predictions,
    bad_line,
    json_lines,
    read_text,
    value_of,
)
from m2f2cli.evaluation.scored import FAKE, REAL, UNKNOWN, Scored, Truth, file_name

_LABELS: Mapping[object, int] = {"real": REAL, "fake": FAKE}
_NAMES = ("image", "path", "name")
# Folders of DD-VQA's annotations whose names differ from the manipulation's usual one.
_DDVQA_KINDS = {"Original": "real", "Neuraltexture": "NeuralTextures"}


def file_truth(path: Path, *, dataset: str = "images", split: str = "all") -> Truth:
    """Read a truth file: JSON Lines of labels, or the published file of DD-VQA questions.

    A row of labels is ``{"image": "5_012.jpg", "label": "real"}``: ``path`` or ``name`` may stand
    for ``image``, 0 and 1 for the words; ``kind`` (the manipulation) and ``video`` (what the
    picture is a frame of) may follow. A row of questions is ``{"5_012_0": {"question": …,
    "answer": […]}}``.

    Raises:
        InputError: The file is missing or empty, or a row is broken; the line is named.
    """
    text = read_text(path)
    items: dict[str, Scored] = {}
    references: dict[str, tuple[str, ...]] = {}
    for number, row in json_lines(path, text):
        try:
            item = _question(row, references) if _is_question(row) else _label_row(row)
        except BadRow as error:
            raise bad_line(path, number, str(error)) from error
        if items.setdefault(item.name, item) != item:
            raise bad_line(path, number, f"says something else of '{item.name}' than before")
    if references and len(references) != len(items):
        raise InputError(f"'{path}' mixes labels of pictures with questions.")
    return Truth(dataset, tuple(items.values()), split, references)


def _is_question(row: Mapping[str, Any]) -> bool:
    return len(row) == 1 and isinstance(next(iter(row.values())), dict)


def _question(row: Mapping[str, Any], references: dict[str, tuple[str, ...]]) -> Scored:
    key, entry = next(iter(row.items()))
    question = value_of(entry, "question", str) or ""
    answers = value_of(entry, "answer", list, required=True)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise BadRow(f"gives '{key}' no reference answer")
    if references.setdefault(key, tuple(answers)) != tuple(answers):
        raise BadRow(f"gives '{key}' other reference answers than before")
    label = stated_label(question)
    picture = re.sub(r"_\d+$", "", key)
    kind = {REAL: "real", FAKE: "fake", None: "unknown"}[label]
    return Scored(key, UNKNOWN if label is None else label, kind, picture, question=question)


def _label_row(row: Mapping[str, Any]) -> Scored:
    name = next((value for key in _NAMES if (value := value_of(row, key, str))), None)
    if name is None:
        raise BadRow("names no picture: it lacks 'image', 'path' and 'name'")
    label = row.get("label")
    if isinstance(label, str):
        label = _LABELS.get(label.lower())
    if isinstance(label, bool) or label not in (REAL, FAKE):
        raise BadRow(f"has {row.get('label')!r} for 'label', which is not 0, 1, real or fake")
    kind = value_of(row, "kind", str) or ("fake" if label == FAKE else "real")
    if (kind == "real") != (label == REAL):
        raise BadRow(f"has the kind '{kind}' and the label {row['label']!r}")
    return Scored(name, int(label), kind, value_of(row, "video", str) or name)


def pictures_of(questions: Truth) -> Truth:
    """The labels of pictures, as a file of questions gives them away.

    Args:
        questions: Of a questions file.

    Raises:
        InputError: A picture's questions do not say what it is, or disagree.
    """
    labels: dict[str, int] = {}
    for item in questions.items:
        if item.label == UNKNOWN or labels.setdefault(item.group, item.label) != item.label:
            raise InputError(
                f"The questions about '{item.group}' do not say whether it is real or forged.",
                hint="Give a file of labels: rows like "
                '{"image": "5_012.jpg", "label": "real", "kind": "real"}.',
            )
    items = tuple(
        Scored(f"{picture}.jpg", label, "fake" if label else "real", f"{picture}.jpg")
        for picture, label in labels.items()
    )
    note = "The labels of the pictures are those that the questions in the truth file name."
    return Truth(questions.dataset, items, questions.split, notes=(note,))


def ddvqa_truth(
    *,
    task: str,
    file: Path | None = None,
    data: Path | None = None,
    predictions: Predictions | None = None,
    from_names: bool = False,
    split: str = "test",
) -> Truth:
    """The truth of DD-VQA: from a file, else from the data set's annotations, else from names.

    Args:
        task: One of ``scored.TASKS``; explanations need the file of questions.
        file: Labels, or the published questions.
        data: The data set's folder.
        predictions: Whose file names are read when ``from_names`` is set and ``data`` is not.
        from_names: Whether file names (``5_…`` is real) may serve as truth.
        split: ``train`` or ``test``; which part of ``data`` is meant.

    Raises:
        InputError: A file or folder cannot be read, or does not say what is needed.
        UsageError: Nothing was named that holds the truth.
    """
    if file is not None:
        found = file_truth(file, dataset="ddvqa", split=split)
        asks_questions = task == "explanation"
        if asks_questions and not found.references:
            raise InputError(
                f"'{file}' holds no reference answers.", hint="Give the file of test questions."
            )
        return found if asks_questions or not found.references else pictures_of(found)
    if task == "explanation":
        raise UsageError(
            "Explanations are measured against reference answers, and none were named.",
            "Add --truth with the file of test questions.",
        )
    if from_names:
        return _truth_from_names(data, predictions, split)
    if data is None:
        raise UsageError(
            "Nothing was named that says which pictures are real.",
            "Add --truth FILE.jsonl or --data DIR, or read DD-VQA's file names with "
            "--truth-from-names.",
        )
    return _annotated(data, split)


def _annotated(data: Path, split: str) -> Truth:
    folder = data / "annotations" / split
    if not folder.is_dir():
        raise InputError(
            f"There are no annotations in '{folder}' that say which pictures are real.",
            "missing",
            "Add --truth FILE.jsonl, or read the labels from file names with --truth-from-names.",
        )
    crops = data / "images" / "c40" / split
    kinds: dict[str, str] = {}
    for file in sorted(folder.rglob("*.json")):
        kind = _DDVQA_KINDS.get(file.parent.name, file.parent.name)
        try:
            annotated = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"'{file}' is not a DD-VQA annotation file: {error}.") from error
        if not isinstance(annotated, dict):
            raise InputError(f"'{file}' is not a DD-VQA annotation file: it holds no object.")
        for stem in annotated:
            if kinds.setdefault(stem, kind) != kind:
                raise InputError(f"'{stem}' is annotated both as {kinds[stem]} and as {kind}.")
    items = []
    for stem, kind in sorted(kinds.items()):
        picture = crops / f"{stem}.jpg"
        if picture.is_file() or not crops.is_dir():
            file_or_none = picture if crops.is_dir() else None
            items.append(_picture(picture.name, kind, file_or_none))
    if not items:
        raise InputError(f"No annotated picture of '{folder}' is in '{crops}'.", "empty")
    return Truth("ddvqa", tuple(items), split)


def _picture(name: str, kind: str, file: Path | None) -> Scored:
    return Scored(name, FAKE if kind != "real" else REAL, kind, name, file=file)


def _truth_from_names(data: Path | None, predictions: Predictions | None, split: str) -> Truth:
    from m2f2cli.data.naming import kind_of
    from m2f2cli.data.readers.ddvqa import read_ddvqa

    notes = ["The labels were read from file names, as asked."]
    if data is not None:
        crops = data / "images" / "c40" / split
        found = read_ddvqa(crops if crops.is_dir() else data)
        items = [_picture(s.name, s.kind, s.path) for s in found.samples]
        return Truth("ddvqa", tuple(items), split, notes=tuple(notes))
    items, rows = [], predictions.rows if predictions else ()
    for name in dict.fromkeys(file_name(row.name) for row in rows):
        kind = kind_of(name)
        if kind is None:
            raise InputError(
                f"'{name}' is not named like a DD-VQA crop (0_005_010.jpg, 5_012.jpg).",
                hint="Give the labels with --truth FILE.jsonl.",
            )
        items.append(_picture(name, kind, None))
    notes.append("Whether answers are missing cannot be told without --data or --truth.")
    return Truth("ddvqa", tuple(items), split, notes=tuple(notes))


def frames_truth(predictions: Predictions) -> Truth:
    """The truth that a published CSV of frames holds itself; the video is the name before ``_N``.

    Args:
        predictions: Of the layout ``frames``.
    """
    items = [
        Scored(name, label, "fake" if label else "real", name.rpartition("_")[0] or name)
        for name, label in predictions.labels.items()
    ]
    return Truth("ffpp", tuple(items), "test", notes=("The labels are those of the CSV itself.",))
