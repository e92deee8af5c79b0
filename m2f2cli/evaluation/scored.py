"""What is measured and what comes out: pictures with truth and answer, and figures with intervals.

NumPy is not needed here, torch is never imported: existing files are evaluated without them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from m2f2cli.data.judgement import parse, stated_label
from m2f2cli.errors import InputError, UsageError
from m2f2cli.evaluation.predictions import Prediction, Predictions

TASKS = ("scores", "judgement", "explanation")
REAL, FAKE, UNKNOWN = 0, 1, -1


@dataclass(frozen=True)
class Scored:
    """One picture, video frame or question, with its truth and what the model said.

    Attributes:
        name: Its key, unique in the set: the path inside the data set, ``<video>/<frame>``, or the
            key of a question.
        label: 0 real, 1 fake; -1 only where an explanation's truth does not say it.
        kind: ``real`` or the manipulation (``fake`` when it is not known).
        group: What the bootstrap resamples: the video, or the picture itself.
        fake_probability: In [0, 1]; None when the model gave none.
        verdict: ``real``, ``fake``, ``uncertain``, or None without one.
        answer: Free text of an explainer.
        question: What was asked.
        file: The picture.
        status: A key of ``records.STATUSES``.
        in_domain: Whether the picture resembles the training pictures; None without a check.
    """

    name: str
    label: int
    kind: str
    group: str
    fake_probability: float | None = None
    verdict: str | None = None
    answer: str | None = None
    question: str | None = None
    file: Path | None = None
    status: str = "ok"
    in_domain: bool | None = None


@dataclass(frozen=True)
class Truth:
    """What is true, before any answer.

    Attributes:
        dataset: ``ffpp``, ``ddvqa`` or ``images``.
        items: Without answers.
        split: ``train``, ``validation``, ``test`` or ``all``.
        references: Reference answers of questions.
        notes: What a report should say about it.
    """

    dataset: str
    items: tuple[Scored, ...]
    split: str = "all"
    references: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoredSet:
    """Every item of a truth, in its order, with the answers that were found for it.

    Attributes:
        dataset: ``ffpp``, ``ddvqa`` or ``images``.
        task: ``scores`` (probabilities), ``judgement`` (texts that say real or fake) or
            ``explanation`` (texts against references).
        items: Every item; those without an answer have no probability, verdict nor answer.
        threshold: The stored one of the predictions' model; None if unknown (0.5 is then used).
        model: As the predictions name it.
        model_fingerprint: ``sha256:…``, or None.
        data_fingerprint: ``sha256:…`` over (name, label, kind, group) of every item.
        split: ``train``, ``validation``, ``test`` or ``all``.
        missing: Names without a prediction.
        duplicates: Names predicted more than once.
        unknown: Predictions that the truth does not know.
        references: Explanation task: name to reference answers.
        notes: What a report should say.
        predictions: The file of answers as it was read; the paper protocol counts its rows.
    """

    dataset: str
    task: str
    items: tuple[Scored, ...]
    threshold: float | None
    model: str | None
    model_fingerprint: str | None
    data_fingerprint: str
    split: str = "all"
    missing: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    references: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    predictions: Predictions | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UsageError(f"The task is one of {', '.join(TASKS)}, not '{self.task}'.")


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        value: None when it is undefined; never NaN.
        low: Lower end of its interval; None without one.
        high: Upper end.
        note: Why it is undefined, or what to know about it.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        for number in (self.value, self.low, self.high):
            if number is not None and not math.isfinite(number):
                raise ValueError("a figure is finite or None")


@dataclass(frozen=True)
class Measures:
    """All figures of one set under one protocol.

    Attributes:
        protocol: ``standard`` or ``paper``.
        figures: Name to figure (``docs/metrics.md`` lists the names).
        per_kind: Manipulation to its figures.
        counts: How many items of which sort.
        definition: Everything the figures depend on besides the data.
        notes: What to know about them.
    """

    protocol: str
    figures: Mapping[str, Figure]
    per_kind: Mapping[str, Mapping[str, Figure]]
    counts: Mapping[str, int]
    definition: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def protocol_hash(self) -> str:
        """``sha256:…`` of the protocol's name and definition as canonical JSON."""
        return canonical_hash({"protocol": self.protocol, "definition": self.definition})


def canonical_hash(value: Mapping[str, Any]) -> str:
    """``sha256:…`` of plain values written as JSON with sorted keys and no spaces."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"


def fingerprint(items: Iterable[Scored]) -> str:
    """``sha256:…`` over (name, label, kind, group) of every item, whatever their order."""
    digest = hashlib.sha256()
    for item in sorted(items, key=lambda item: item.name):
        digest.update(repr((item.name, item.label, item.kind, item.group)).encode())
    return f"sha256:{digest.hexdigest()}"


def join(truth: Truth, predictions: Predictions) -> ScoredSet:
    """Give every item of a truth its answer.

    A prediction belongs to the item of the same name, or whose file has that path; else to the
    item with the same file name, if only one item and only one predicted name have it. Of several
    answers for one item the last one counts.

    Args:
        truth: What is true.
        predictions: A file of answers.

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
    duplicates = tuple(name for name, rows in answers.items() if len(rows) > 1)
    notes = [*truth.notes, *predictions.notes]
    if by_file_name:
        notes.append(f"Predictions matched by file name alone: {by_file_name:,}.")
    notes += _said_of_duplicates(duplicates, answers)
    if task == "explanation":
        told = sum(stated_label(item.question or "") is not None for item in joined)
        notes.append(f"{told:,} of {len(joined):,} questions contain the label.")
    return ScoredSet(
        dataset=truth.dataset,
        task=task,
        items=joined,
        threshold=predictions.threshold,
        model=predictions.model,
        model_fingerprint=predictions.model_fingerprint,
        data_fingerprint=fingerprint(truth.items),
        split=truth.split,
        missing=tuple(name for name in items if name not in answers),
        duplicates=duplicates,
        unknown=tuple(dict.fromkeys(r.name for r in predictions.rows if r.name not in owners)),
        references=truth.references,
        notes=tuple(notes),
        predictions=predictions,
    )


def _owners(items: Mapping[str, Scored], names: list[str], task: str) -> tuple[dict[str, str], int]:
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
    in_truth, in_predictions = (Counter(map(file_name, group)) for group in (items, predicted))
    of_file = {file_name(name): name for name in items}
    by_file_name = 0
    for name in predicted:
        short = file_name(name)
        if name not in owners and in_truth[short] == in_predictions[short] == 1:
            owners[name] = of_file[short]
            by_file_name += 1
    return owners, by_file_name


def file_name(name: str) -> str:
    """The last part of a path, whichever system's slashes it has."""
    return name.replace("\\", "/").rpartition("/")[2]


def _answered(item: Scored, rows: Sequence[Prediction], task: str) -> Scored:
    if not rows:
        return item
    row = rows[-1]
    verdict = parse(row.answer or "") if task == "judgement" else row.verdict
    return replace(
        item,
        fake_probability=row.fake_probability,
        verdict=verdict,
        answer=row.answer,
        question=row.question or item.question,
        status=row.status,
        in_domain=row.in_domain,
    )


def _said_of_duplicates(
    duplicates: Sequence[str], answers: Mapping[str, Sequence[Prediction]]
) -> list[str]:
    if not duplicates:
        return []
    differ = sum(
        any(not row.same_answer(answers[name][0]) for row in answers[name]) for name in duplicates
    )
    return [
        f"Items predicted more than once: {len(duplicates):,}, {differ:,} of them with different "
        "answers; the last one counts."
    ]
