"""The report of an evaluation: plain data with a documented schema, and the files it lives in.

``docs/evaluate.md`` names every key. NumPy is not needed to read or write a report.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from m2f2cli.environment import library_versions
from m2f2cli.errors import InputError, UsageError
from m2f2cli.evaluation.predictions import read_text, refuse_constant
from m2f2cli.evaluation.protocols import Figure, Measures
from m2f2cli.evaluation.truth import FAKE, REAL, UNKNOWN, Item, Joined
from m2f2cli.files import atomic_write
from m2f2cli.records import STATUSES, VERDICTS, to_line

SCHEMA_VERSION = 1
KIND = "evaluation"
REPORT, ITEMS, PAGE = "report.json", "scored.jsonl", "index.html"
NAMES_KEPT = 100  # of the missing, duplicate and unknown items each


class SavedReport(NamedTuple):
    """A report as read back from its folder.

    Attributes:
        path: Its ``report.json``.
        report: The object in it.
        scored: The joined items beside it.
    """

    path: Path
    report: dict[str, Any]
    scored: Joined


def build_report(
    scored: Joined, measures: Measures, *, predictions: Path | None = None
) -> dict[str, Any]:
    """Everything that is known about an evaluation, as JSON values.

    Args:
        scored: The joined items.
        measures: Their figures.
        predictions: The file the answers came from; its sha256 is taken.

    Raises:
        InputError: The file of predictions is gone.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": library_versions(),
        "dataset": scored.dataset,
        "task": scored.task,
        "split": scored.split,
        "protocol": {
            "name": measures.protocol,
            "sha256": measures.protocol_hash,
            "definition": dict(measures.definition),
        },
        "model": {
            "name": scored.model,
            "fingerprint": scored.model_fingerprint,
            "threshold": scored.threshold,
        },
        "data": {
            "fingerprint": scored.data_fingerprint,
            "missing": _first(scored.missing),
            "duplicates": _first(scored.duplicates),
            "unknown": _first(scored.unknown),
        },
        "predictions": {
            "file": str(predictions) if predictions else None,
            "sha256": _file_sha256(predictions) if predictions else None,
        },
        "items": {"file": ITEMS, "sha256": sha256_of(items_as_lines(scored))},
        "counts": dict(measures.counts),
        "figures": {name: plain_figure(f) for name, f in measures.figures.items()},
        "per_kind": {
            kind: {name: plain_figure(f) for name, f in figures.items()}
            for kind, figures in measures.per_kind.items()
        },
        "notes": list(dict.fromkeys((*scored.notes, *measures.notes))),
    }


def plain_figure(figure: Figure) -> dict[str, Any]:
    """A figure as JSON values, every key present."""
    return {
        "value": figure.value,
        "low": figure.low,
        "high": figure.high,
        "note": figure.note,
    }


def sha256_of(data: bytes) -> str:
    """``sha256:`` and the digest of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _file_sha256(path: Path) -> str:
    try:
        return sha256_of(path.read_bytes())
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}.", "missing") from error


def _first(names: Iterable[str]) -> list[str]:
    return sorted(names)[:NAMES_KEPT]


def items_as_lines(scored: Joined) -> bytes:
    """The content of ``scored.jsonl``: one item a line, in the truth's order."""
    lines = []
    for item in scored.items:
        row = {part.name: getattr(item, part.name) for part in fields(item)}
        row["file"] = None if item.file is None else str(item.file)
        row["references"] = list(scored.references.get(item.name, ()))
        lines.append(to_line(row))
    return b"".join(lines)


def check_folder(folder: Path) -> None:
    """Refuse, before the work, a folder that a report may not be written into.

    Raises:
        UsageError: It is a file, or its ``index.html`` belongs to something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"'{folder}' is a file, not a folder.", "Choose another --report.")
    if (folder / PAGE).exists() and not (folder / REPORT).exists():
        raise UsageError(
            f"'{folder / PAGE}' is not the page of a report, so it is not replaced.",
            "Choose another --report.",
        )


def write_report(folder: Path, report: Mapping[str, Any], scored: Joined, page: str) -> None:
    """Write a report's three files, each in one step, ``report.json`` last.

    Args:
        folder: Made when missing; an earlier report in it is replaced.
        report: Of ``build_report``.
        scored: The items it was made of.
        page: The HTML page.

    Raises:
        CheckpointError: A file cannot be written; what was there remains.
    """
    text = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False)
    atomic_write(folder / ITEMS, items_as_lines(scored))
    atomic_write(folder / PAGE, page.encode("utf-8", "backslashreplace"))
    atomic_write(folder / REPORT, (text + "\n").encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a strict JSON object.

    Raises:
        InputError: The file is missing, empty, cut off, no JSON, or holds NaN or no object.
    """
    text = read_text(path)
    try:
        found = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"'{path}' does not hold a JSON object.")
    return found


def is_report(found: Mapping[str, Any]) -> bool:
    """Whether an object says that it is a report of an evaluation."""
    return found.get("kind") == KIND and "schema_version" in found


def read_report(path: Path) -> SavedReport:
    """Read a report and its items back.

    Args:
        path: The folder, or the ``report.json`` in it.

    Raises:
        InputError: A file is missing or broken, the schema is another one, or the items are not
            those that the report was made of.
    """
    file = path / REPORT if path.is_dir() else path
    report = read_json(file)
    if not is_report(report):
        raise InputError(
            f"'{file}' is not a report of 'm2f2 evaluate'.", hint="Name a folder made by --report."
        )
    if report["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"'{file}' has schema version {report['schema_version']}, not {SCHEMA_VERSION}.",
            hint="Read it with the m2f2 version that wrote it.",
        )
    items_file = file.parent / ITEMS
    try:
        data = items_file.read_bytes()
    except OSError as error:
        raise InputError(
            f"'{file}' needs the file '{ITEMS}' beside it, which cannot be read.",
            "missing",
            "Make the report again with --report DIR and keep the whole folder.",
        ) from error
    try:
        if sha256_of(data) != report["items"]["sha256"]:
            raise InputError(
                f"'{items_file}' is not the file that '{file.name}' beside it was made with.",
                hint="Make the report again with --report DIR.",
            )
        return SavedReport(file, report, _scored_set(report, data))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"'{file}' is malformed: {error!r}.") from error


def _scored_set(report: Mapping[str, Any], data: bytes) -> Joined:
    items, references = [], {}
    for number, line in enumerate(data.splitlines(), start=1):
        row = json.loads(line)
        texts = tuple(row.pop("references"))
        row["file"] = None if row["file"] is None else Path(row["file"])
        item = Item(**row)
        _check_item(item, number)
        items.append(item)
        if texts:
            references[item.name] = texts
    return Joined(
        dataset=report["dataset"],
        task=report["task"],
        items=tuple(items),
        threshold=report["model"]["threshold"],
        model=report["model"]["name"],
        model_fingerprint=report["model"]["fingerprint"],
        data_fingerprint=report["data"]["fingerprint"],
        split=report["split"],
        missing=tuple(report["data"]["missing"]),
        duplicates=tuple(report["data"]["duplicates"]),
        unknown=tuple(report["data"]["unknown"]),
        references=references,
        notes=tuple(report["notes"]),
    )


def _check_item(item: Item, number: int) -> None:
    score = item.fake_probability
    sound = (
        isinstance(item.name, str)
        and isinstance(item.group, str)
        and item.label in (REAL, FAKE, UNKNOWN)
        and item.verdict in (None, *VERDICTS)
        and item.status in STATUSES
        and (score is None or (isinstance(score, (int, float)) and math.isfinite(score)))
    )
    if not sound:
        raise ValueError(f"line {number} of {ITEMS}")


class Mistake(NamedTuple):
    """An item that was answered wrongly, or not at all.

    Attributes:
        item: The item.
        confidence: Probability given to the wrong class, in [0, 1]; 1 where there is only a word.
        words: What was said.
    """

    item: Item
    confidence: float
    words: str


def call_of(item: Item, scored: Joined) -> str | None:
    """What an item counts as: ``real``, ``fake``, or None without an answer.

    A probability is held against the threshold, whatever its verdict; a text counts as it says.
    """
    if scored.task == "judgement":
        return item.verdict
    if item.fake_probability is None:
        return None
    return "fake" if item.fake_probability >= scored.threshold_used else "real"


def find_mistakes(scored: Joined) -> list[Mistake]:
    """Items answered wrongly or not at all, the most confident first, then in the truth's order.

    Explanations have no right or wrong: of them only those without words are listed.
    """
    found = []
    for item in scored.items:
        if scored.task == "explanation":
            if not (item.answer or "").strip():
                found.append(Mistake(item, 0.0, "no answer"))
            continue
        call = call_of(item, scored)
        if call is None:
            found.append(Mistake(item, 0.0, _silence(item)))
        elif call != ("fake" if item.label == FAKE else "real"):
            found.append(_mistake(item, call))
    return sorted(found, key=lambda mistake: -mistake.confidence)


def _mistake(item: Item, call: str) -> Mistake:
    score = item.fake_probability
    if score is None:
        return Mistake(item, 1.0, f"called {call}")
    confidence = score if call == "fake" else 1 - score
    return Mistake(item, confidence, f"fake probability {score:.3f}")


def _silence(item: Item) -> str:
    if item.status != "ok":
        return f"not judged: {item.status}"
    return "no answer" if item.answer is None else "the answer says neither real nor fake"
