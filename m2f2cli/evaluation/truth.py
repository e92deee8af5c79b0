"""What is true of each picture or question, and the answers joined to it.

Truth is read from files, from file names only when asked. The labels of a folder of pictures and of
HDF5 files come from ``evaluate.truth_of``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from m2f2cli.data.conversations import parse_verdict, stated_label
from m2f2cli.data.samples import DDVQA_CROPS, SampleSet, kind_of
from m2f2cli.errors import InputError, UsageError
from m2f2cli.evaluation.predictions import (
    BadRow,
    Prediction,
    Predictions,
    bad_line,
    json_lines,
    value_of,
)
from m2f2cli.files import parse_json
from m2f2cli.records import read_text

TASKS = ("scores", "judgement", "explanation")
REAL, FAKE, UNKNOWN = 0, 1, -1


@dataclass(frozen=True)
class Item:
    """One picture, video frame or question, with its truth and what the model said."""

    # Its key, unique in the set: the path inside the data set, <video>/<frame>, or the key of a
    # question
    name: str
    label: int  # 0 real, 1 fake; -1 only where an explanation's truth does not say it
    kind: str  # real or the manipulation (fake when it is not known)
    group: str  # what the bootstrap resamples: the video, or the picture itself
    fake_probability: float | None = None  # in [0, 1]; None when the model gave none
    verdict: str | None = None  # real, fake, uncertain, or None without one
    answer: str | None = None  # free text of an explainer
    question: str | None = None  # what was asked
    file: Path | None = None  # the picture
    status: str = "ok"  # a key of records.STATUSES
    # Whether the picture resembles the training pictures; None without a check
    in_domain: bool | None = None
    forgery: str | None = None  # the kind that a fake verdict names; None as in records.Detection


@dataclass(frozen=True)
class Truth:
    """What is true, before any answer."""

    dataset: str  # ffpp, ddvqa or images
    items: tuple[Item, ...]  # without answers
    split: str = "all"  # train, validation, test or all
    # Reference answers of questions
    references: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a report should say about it


@dataclass(frozen=True)
class Joined:
    """Every item of a truth, in its order, with the answers that were found for it."""

    dataset: str  # ffpp, ddvqa or images
    # scores (probabilities), judgement (texts that say real or fake) or explanation (texts against
    # references)
    task: str
    # Every item; those without an answer have no probability, verdict nor answer
    items: tuple[Item, ...]
    # The stored one of the predictions' model; None if unknown (0.5 is then used)
    threshold: float | None
    model: str | None  # as the predictions name it
    model_fingerprint: str | None  # sha256:…, or None
    data_fingerprint: str  # sha256:… over (name, label, kind, group) of every item
    split: str = "all"  # train, validation, test or all
    missing: tuple[str, ...] = ()  # names without a prediction
    duplicates: tuple[str, ...] = ()  # names predicted more than once
    unknown: tuple[str, ...] = ()  # predictions that the truth does not know
    # Explanation task: name to reference answers
    references: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a report should say
    # The file of answers as it was read; the paper protocol counts its rows
    predictions: Predictions | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UsageError(f"The task is one of {', '.join(TASKS)}, not '{self.task}'.")

    @property
    def threshold_used(self) -> float:
        """Fake from here on: what the predictions name, else 0.5."""
        return 0.5 if self.threshold is None else self.threshold


def fingerprint(items: Iterable[Item]) -> str:
    """``sha256:…`` over (name, label, kind, group) of every item, whatever their order."""
    digest = hashlib.sha256()
    for item in sorted(items, key=lambda item: item.name):
        digest.update(repr((item.name, item.label, item.kind, item.group)).encode())
    return f"sha256:{digest.hexdigest()}"


def join(truth: Truth, predictions: Predictions) -> Joined:
    """Give every item of a truth its answer.

    A prediction belongs to the item of the same name, or whose file has that path; else to the
    item with the same file name, if only one item and only one predicted name have it. Of several
    answers for one item the last one counts.

    Raises:
        InputError: Not one prediction is about an item of the truth.
        UsageError: The predictions are explanations and the truth has no references.
    """
    task = predictions.task
    if task == "explanation" and not truth.references:
        raise UsageError(
            f"'{predictions.path}' holds explanations, and the truth no reference answers.",
            "Add --truth with the file of test questions.",
        )
    items = {item.name: item for item in truth.items}
    owners, by_file_name = _owners(items, [row.name for row in predictions.rows], task)
    answers: dict[str, list[Prediction]] = {}
    for row in predictions.rows:
        if row.name in owners:
            answers.setdefault(owners[row.name], []).append(row)
    if not answers:
        raise InputError(
            f"None of the {len(predictions.rows)} predictions in '{predictions.path}' is about an "
            f"item of the truth, such as '{next(iter(items))}'.",
            hint="Check that both speak of the same data set and name pictures alike.",
        )
    joined = tuple(_answered(item, answers.get(item.name, ()), task) for item in truth.items)
    repeated = {name: rows for name, rows in answers.items() if len(rows) > 1}
    notes = [*truth.notes, *predictions.notes]
    if by_file_name:
        notes.append(f"Predictions matched by file name alone: {by_file_name:,}.")
    if repeated:
        differ = sum(not all(map(rows[0].same_answer, rows)) for rows in repeated.values())
        notes.append(
            f"Items predicted more than once: {len(repeated):,}, {differ:,} of them with different "
            "answers; the last one counts."
        )
    if task == "explanation":
        told = sum(stated_label(item.question or "") is not None for item in joined)
        notes.append(f"{told:,} of {len(joined):,} questions contain the label.")
    return Joined(
        dataset=truth.dataset,
        task=task,
        items=joined,
        threshold=predictions.threshold,
        model=predictions.model,
        model_fingerprint=predictions.model_fingerprint,
        data_fingerprint=fingerprint(truth.items),
        split=truth.split,
        missing=tuple(name for name in items if name not in answers),
        duplicates=tuple(repeated),
        unknown=tuple(dict.fromkeys(r.name for r in predictions.rows if r.name not in owners)),
        references=truth.references,
        notes=tuple(notes),
        predictions=predictions,
    )


def _owners(items: Mapping[str, Item], names: list[str], task: str) -> tuple[dict[str, str], int]:
    """For each predicted name the item it is about, and how many were found by file name."""
    paths = {os.path.abspath(i.file): i.name for i in items.values() if i.file is not None}
    predicted = dict.fromkeys(names)
    owners = {}
    for name in predicted:
        owner = name if name in items else paths.get(os.path.abspath(name))
        if owner is not None:
            owners[name] = owner
    if task == "explanation":  # keys of questions are no paths
        return owners, 0
    in_truth, in_predictions = (Counter(map(_file_name, group)) for group in (items, predicted))
    of_file = {_file_name(name): name for name in items}
    by_file_name = 0
    for name in predicted:
        short = _file_name(name)
        if name not in owners and in_truth[short] == in_predictions[short] == 1:
            owners[name] = of_file[short]
            by_file_name += 1
    return owners, by_file_name


def _file_name(name: str) -> str:
    """The last part of a path, whichever system's slashes it has."""
    return name.replace("\\", "/").rpartition("/")[2]


def _answered(item: Item, rows: Sequence[Prediction], task: str) -> Item:
    if not rows:
        return item
    row = rows[-1]
    return replace(
        item,
        fake_probability=row.fake_probability,
        verdict=parse_verdict(row.answer or "") if task == "judgement" else row.verdict,
        answer=row.answer,
        question=row.question or item.question,
        status=row.status,
        in_domain=row.in_domain,
        forgery=row.forgery,
    )


def file_truth(path: Path, *, dataset: str = "images", split: str = "all") -> Truth:
    """Read a truth file: JSON Lines of labels, or the published file of DD-VQA questions.

    A row of labels is ``{"image": "5_012.jpg", "label": "real"}``: ``path`` or ``name`` may stand
    for ``image``, 0 and 1 for the words; ``kind`` (the manipulation) and ``video`` (what the
    picture is a frame of) may follow. A row of questions is ``{"5_012_0": {"question": …,
    "answer": […]}}``.

    Raises:
        InputError: The file is missing or empty, or a row is broken; the line is named.
    """
    items: dict[str, Item] = {}
    references: dict[str, tuple[str, ...]] = {}
    for number, row in json_lines(path, read_text(path)):
        questions = len(row) == 1 and isinstance(next(iter(row.values())), dict)
        try:
            item = _question(row, references) if questions else _label_row(row)
        except BadRow as error:
            raise bad_line(path, number, str(error)) from error
        if items.setdefault(item.name, item) != item:
            raise bad_line(path, number, f"says something else of '{item.name}' than before")
    if references and len(references) != len(items):
        raise InputError(f"'{path}' mixes labels of pictures with questions.")
    return Truth(dataset, tuple(items.values()), split, references)


def _question(row: Mapping[str, Any], references: dict[str, tuple[str, ...]]) -> Item:
    ((key, entry),) = row.items()
    question = value_of(entry, "question", str) or ""
    answers = value_of(entry, "answer", list, required=True)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise BadRow(f"gives '{key}' no reference answer")
    if references.setdefault(key, tuple(answers)) != tuple(answers):
        raise BadRow(f"gives '{key}' other reference answers than before")
    label = stated_label(question)
    picture = re.sub(r"_\d+$", "", key)
    kind = {REAL: "real", FAKE: "fake", None: "unknown"}[label]
    return Item(key, UNKNOWN if label is None else label, kind, picture, question=question)


def _label_row(row: Mapping[str, Any]) -> Item:
    names = (value_of(row, key, str) for key in ("image", "path", "name"))
    name = next(filter(None, names), None)
    if name is None:
        raise BadRow("names no picture: it lacks 'image', 'path' and 'name'")
    label = row.get("label")
    if isinstance(label, str):
        label = {"real": REAL, "fake": FAKE}.get(label.lower())
    if isinstance(label, bool) or label not in (REAL, FAKE):
        raise BadRow(f"has {row.get('label')!r} for 'label', which is not 0, 1, real or fake")
    kind = value_of(row, "kind", str) or ("fake" if label == FAKE else "real")
    if (kind == "real") != (label == REAL):
        raise BadRow(f"has the kind '{kind}' and the label {row['label']!r}")
    return Item(name, int(label), kind, value_of(row, "video", str) or name)


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
        task: One of ``TASKS``; explanations need the file of questions.
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
        if task != "explanation":
            return _labels_of_questions(found) if found.references else found
        if not found.references:
            raise InputError(
                f"'{file}' holds no reference answers.", hint="Give the file of test questions."
            )
        return found
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


def _labels_of_questions(questions: Truth) -> Truth:
    """The labels of pictures, as the questions about them give them away."""
    labels: dict[str, int] = {}
    for item in questions.items:
        if item.label == UNKNOWN or labels.setdefault(item.group, item.label) != item.label:
            raise InputError(
                f"The questions about '{item.group}' do not say whether it is real or forged.",
                hint="Give a file of labels: rows like "
                '{"image": "5_012.jpg", "label": "real", "kind": "real"}.',
            )
    items = [_picture(f"{n}.jpg", "fake" if label else "real") for n, label in labels.items()]
    note = "The labels of the pictures are those that the questions in the truth file name."
    return Truth(questions.dataset, tuple(items), questions.split, notes=(note,))


def _annotated(data: Path, split: str) -> Truth:
    folder = data / "annotations" / split
    if not folder.is_dir():
        raise InputError(
            f"There are no annotations in '{folder}' that say which pictures are real.",
            "missing",
            "Add --truth FILE.jsonl, or read the labels from file names with --truth-from-names.",
        )
    # Folders of annotations whose names differ from the manipulation's usual one.
    renamed = {"Original": "real", "Neuraltexture": "NeuralTextures"}
    kinds: dict[str, str] = {}
    for file in sorted(folder.rglob("*.json")):
        kind = renamed.get(file.parent.name, file.parent.name)
        try:
            annotated = parse_json(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise InputError(f"'{file}' is not a DD-VQA annotation file: {error}.") from error
        if not isinstance(annotated, dict):
            raise InputError(f"'{file}' is not a DD-VQA annotation file: it holds no object.")
        for stem in annotated:
            if kinds.setdefault(stem, kind) != kind:
                raise InputError(f"'{stem}' is annotated both as {kinds[stem]} and as {kind}.")
    crops = data / DDVQA_CROPS / split
    files = {stem: crops / f"{stem}.jpg" if crops.is_dir() else None for stem in sorted(kinds)}
    items = [
        _picture(f"{stem}.jpg", kinds[stem], file)
        for stem, file in files.items()
        if file is None or file.is_file()
    ]
    if not items:
        raise InputError(f"No annotated picture of '{folder}' is in '{crops}'.", "empty")
    return Truth("ddvqa", tuple(items), split)


def _picture(name: str, kind: str, file: Path | None = None) -> Item:
    return Item(name, REAL if kind == "real" else FAKE, kind, name, file=file)


def read_crops(data: Path, split: str) -> SampleSet:
    """DD-VQA's crops of a split, or those that lie in the folder itself."""
    from m2f2cli.data.readers.ddvqa import read_ddvqa

    crops = data / DDVQA_CROPS / split
    return read_ddvqa(crops if crops.is_dir() else data)


def _truth_from_names(data: Path | None, predictions: Predictions | None, split: str) -> Truth:
    notes = ["The labels were read from file names, as asked."]
    if data is not None:
        items = [_picture(s.name, s.kind, s.path) for s in read_crops(data, split).samples]
        return Truth("ddvqa", tuple(items), split, notes=tuple(notes))
    items, rows = [], predictions.rows if predictions else ()
    for name in dict.fromkeys(_file_name(row.name) for row in rows):
        kind = kind_of(name)
        if kind is None:
            raise InputError(
                f"'{name}' is not named like a DD-VQA crop (0_005_010.jpg, 5_012.jpg).",
                hint="Give the labels with --truth FILE.jsonl.",
            )
        items.append(_picture(name, kind))
    notes.append("Whether answers are missing cannot be told without --data or --truth.")
    return Truth("ddvqa", tuple(items), split, notes=tuple(notes))


def frames_truth(predictions: Predictions) -> Truth:
    """The truth that a published CSV of frames holds; the video is the name before ``_N``."""
    items = [
        Item(name, label, "fake" if label else "real", name.rpartition("_")[0] or name)
        for name, label in predictions.labels.items()
    ]
    return Truth("ffpp", tuple(items), "test", notes=("The labels are those of the CSV itself.",))
