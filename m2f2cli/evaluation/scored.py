"""What is measured and what comes out: pictures with truth and answer, and figures with intervals.

NumPy is not needed here, torch is never imported: existing files are evaluated without them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2f2cli.errors import UsageError

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
    """``sha256:…`` over (name, label, kind, group) of every item, in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.name, item.label, item.kind, item.group)).encode())
    return f"sha256:{digest.hexdigest()}"
