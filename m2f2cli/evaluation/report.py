"""The report of an evaluation: its files, what is wrong in it, and gates that it is held against.

It is plain data with a documented schema: ``docs/evaluate.md`` names every key.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from m2f2cli.environment import library_versions
from m2f2cli.errors import InputError, UsageError
from m2f2cli.evaluation.protocols import Measures, risk_curve
from m2f2cli.evaluation.truth import FAKE, REAL, UNKNOWN, Item, Joined
from m2f2cli.files import atomic_write, parse_json
from m2f2cli.records import STATUSES, VERDICTS, read_text, to_line

SCHEMA_VERSION, KIND = 1, "evaluation"
REPORT, ITEMS, PAGE = "report.json", "scored.jsonl", "index.html"
NAMES_KEPT = 100  # of the missing, duplicate and unknown items each


def build_report(
    scored: Joined, measures: Measures, *, predictions: Path | None = None
) -> dict[str, Any]:
    """Everything that is known about an evaluation, as JSON values.

    Raises:
        InputError: The file of predictions, whose sha256 is taken, is gone.
    """
    try:
        answers = sha256_of(predictions.read_bytes()) if predictions else None
    except OSError as error:
        raise InputError(f"'{predictions}' cannot be read: {error.strerror}.", "missing") from error
    kept = {
        name: sorted(getattr(scored, name))[:NAMES_KEPT]
        for name in ("missing", "duplicates", "unknown")
    }
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
        "data": {"fingerprint": scored.data_fingerprint, **kept},
        "predictions": {"file": str(predictions) if predictions else None, "sha256": answers},
        "items": {"file": ITEMS, "sha256": sha256_of(items_as_lines(scored))},
        "counts": dict(measures.counts),
        "figures": {name: asdict(figure) for name, figure in measures.figures.items()},
        "per_kind": {
            kind: {name: asdict(figure) for name, figure in figures.items()}
            for kind, figures in measures.per_kind.items()
        },
        "forgeries": count_forgeries(scored),
        "risk_coverage": risk_curve(scored),
        "notes": list(dict.fromkeys((*scored.notes, *measures.notes))),
    }


def count_forgeries(scored: Joined) -> dict[str, dict[str, int]]:
    """How often each kind of forgery was named, by the true manipulation, ``real`` for none."""
    found: dict[str, dict[str, int]] = {}
    for kind, name in sorted((i.kind, i.forgery) for i in scored.items if i.forgery is not None):
        row = found.setdefault(kind, {})
        row[name] = row.get(name, 0) + 1
    return found


def sha256_of(data: bytes) -> str:
    """``sha256:`` and the digest of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def items_as_lines(scored: Joined) -> bytes:
    """The content of ``scored.jsonl``: one item a line, in the truth's order."""
    lines = []
    for item in scored.items:
        row = {**vars(item), "references": list(scored.references.get(item.name, ()))}
        row["file"] = None if item.file is None else str(item.file)
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

    The folder is made when missing; an earlier report in it is replaced.

    Raises:
        CheckpointError: A file cannot be written; what was there remains.
    """
    text = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False)
    atomic_write(folder / ITEMS, items_as_lines(scored))
    atomic_write(folder / PAGE, page.encode("utf-8", "backslashreplace"))
    atomic_write(folder / REPORT, (text + "\n").encode("utf-8", "backslashreplace"))


class SavedReport(NamedTuple):
    """A report as read back from its folder."""

    path: Path  # its report.json
    report: dict[str, Any]  # the object in it
    scored: Joined  # the joined items beside it


def read_object(path: Path) -> dict[str, Any]:
    """The strict JSON object in a file.

    Raises:
        InputError: The file is missing, empty, cut off, no JSON, or holds NaN or no object.
    """
    try:
        found = parse_json(read_text(path), strict=True)
    except ValueError as error:
        raise InputError(f"'{path}' is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InputError(f"'{path}' does not hold a JSON object.")
    return found


def _is_report(found: Mapping[str, Any]) -> bool:
    return found.get("kind") == KIND and "schema_version" in found


def read_report(path: Path) -> SavedReport:
    """Read a report and its items back, from its folder or the ``report.json`` in it.

    Raises:
        InputError: A file is missing or broken, the schema is another one, or the items are not
            those that the report was made of.
    """
    file = path / REPORT if path.is_dir() else path
    report = read_object(file)
    if not _is_report(report):
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
        return SavedReport(file, report, _read_items(report, data))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"'{file}' is malformed: {error!r}.") from error


_TEXTS: tuple[Any, ...] = (str, None)
# What is read of report.json, and all of a line of scored.jsonl: types, lists of one type, the
# values or types that may stand there, and ranges.
_REPORT: dict[str, Any] = {
    "created": str, "dataset": str, "task": str, "split": str, "notes": [str],
    "protocol": {"name": str, "sha256": str},
    "model": {"name": _TEXTS, "fingerprint": _TEXTS, "threshold": (range(2), None)},
    "data": {"fingerprint": str, "missing": [str], "duplicates": [str], "unknown": [str]},
}  # fmt: skip
_ITEM: dict[str, Any] = {
    "name": str, "kind": str, "group": str, "label": (REAL, FAKE, UNKNOWN),
    "verdict": (None, *VERDICTS), "status": tuple(STATUSES), "fake_probability": (range(2), None),
    "answer": _TEXTS, "question": _TEXTS, "file": _TEXTS, "in_domain": (bool, None),
    "forgery": _TEXTS, "references": [str],
}  # fmt: skip


def _misfit(value: Any, shape: Any, at: str = "") -> str | None:
    """Where a JSON value is not of a shape; None where it is."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return at or "no object"
        inner = (_misfit(value.get(key), part, f"{at}{key}.") for key, part in shape.items())
        return next(filter(None, inner), None)
    if isinstance(shape, tuple):
        fits = any(_misfit(value, part, "x") is None for part in shape)
    elif isinstance(shape, list):
        fits = isinstance(value, list) and all(isinstance(one, shape[0]) for one in value)
    elif isinstance(shape, range):  # from its first number to its last
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = number and shape[0] <= value <= shape[-1]
    elif isinstance(shape, type):
        fits = isinstance(value, shape)
    else:
        fits = type(value) is type(shape) and value == shape
    return None if fits else at.rstrip(".")


def _read_items(report: Mapping[str, Any], data: bytes) -> Joined:
    if fault := _misfit(report, _REPORT):
        raise TypeError(fault)
    items, references = [], {}
    for number, line in enumerate(data.splitlines(), start=1):
        row = parse_json(line, strict=True)
        if fault := _misfit(row, _ITEM):
            raise ValueError(f"line {number} of {ITEMS}: {fault}")
        texts = tuple(row.pop("references"))
        row["file"] = None if row["file"] is None else Path(row["file"])
        item = Item(**row)
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


class Mistake(NamedTuple):
    """An item that was answered wrongly, or not at all."""

    item: Item  # the item
    # Probability given to the wrong class, in [0, 1]; 1 where there is only a word
    confidence: float
    words: str  # what was said


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
        call, score = call_of(item, scored), item.fake_probability
        if call is None:
            found.append(Mistake(item, 0.0, _silence(item)))
        elif call != ("fake" if item.label == FAKE else "real"):
            if score is None:
                found.append(Mistake(item, 1.0, f"called {call}"))
            else:
                surety = score if call == "fake" else 1 - score
                found.append(Mistake(item, surety, f"fake probability {score:.3f}"))
    return sorted(found, key=lambda mistake: -mistake.confidence)


def _silence(item: Item) -> str:
    if item.status != "ok":
        return f"not judged: {item.status}"
    return "no answer" if item.answer is None else "the answer says neither real nor fake"


TOLERANCE = 1e-6
# The first of these that a report has is what a floor is held against.
AUC = ("frame_auc", "video_auc")
ACCURACY = ("accuracy",)


class Expectation(NamedTuple):
    """What ``--check`` holds a report against."""

    # (value, largest accepted difference) of a figure, of KIND.figure of one manipulation, or of
    # counts.NAME; None where it should be undefined
    figures: Mapping[str, tuple[float | None, float]]
    # Dotted paths into the report to what must stand there, such as protocol.sha256; only an
    # earlier report asks for any
    identity: Mapping[str, str]


def read_expectation(path: Path) -> Expectation:
    """Read what figures should be.

    The file holds ``{"accuracy": 0.9444, "frame_auc": {"value": 0.98, "tolerance": 0.005}}``, the
    same under a key ``figures`` beside ``per_kind`` and ``counts``, or is an earlier
    ``report.json``. A ``tolerance`` beside them is for all that state none.

    Raises:
        InputError: The file cannot be read, expects nothing, or a value is no number.
    """
    found = read_object(path)
    identity = {}
    if _is_report(found):
        paths = ("dataset", "protocol.sha256", "data.fingerprint")
        identity = {dotted: _at(found, dotted) for dotted in paths}
    default = _number(path, "tolerance", found.pop("tolerance", TOLERANCE), low=0.0)
    rows: Mapping[str, Any] = found
    if isinstance(found.get("figures"), dict):
        groups = (found.get("per_kind"), {"counts": found.get("counts")})
        rows = {**found["figures"], **_dotted(groups[0]), **_dotted(groups[1])}
    figures = {key: _expected(path, key, value, default) for key, value in rows.items()}
    if not figures:
        raise InputError(f"'{path}' expects nothing.", "empty", 'For example: {"accuracy": 0.9444}')
    return Expectation(figures, identity)


def _dotted(groups: Any) -> dict[str, Any]:
    inner = groups.items() if isinstance(groups, dict) else ()
    return {
        f"{group}.{name}": value
        for group, values in inner
        if isinstance(values, dict)
        for name, value in values.items()
    }


def _expected(path: Path, key: str, row: Any, tolerance: float) -> tuple[float | None, float]:
    if isinstance(row, dict):
        if "value" not in row:
            raise InputError(f"'{path}' gives '{key}' no value.", hint='{"value": 0.9444}')
        if "tolerance" in row:
            tolerance = _number(path, f"{key}.tolerance", row["tolerance"], low=0.0)
        row = row["value"]
    return None if row is None else _number(path, key, row), tolerance


def _number(path: Path, key: str, value: Any, low: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(
            f"'{path}' expects {value!r} of '{key}', which is not a number.",
            hint='For example: {"accuracy": {"value": 0.9444, "tolerance": 0.001}}',
        )
    if value < low:
        raise InputError(f"'{path}' gives '{key}' as {value}, below {low:g}.")
    if abs(value) > sys.float_info.max:
        raise InputError(f"'{path}' gives '{key}' too large a number.")
    return float(value)


def tripped(
    report: Mapping[str, Any],
    expectation: Expectation | None = None,
    *,
    min_auc: float | None = None,
    min_accuracy: float | None = None,
) -> list[str]:
    """Why a report does not pass, a sentence each; empty when it does."""
    found = drifts(report, expectation) if expectation else []
    for names, floor in ((AUC, min_auc), (ACCURACY, min_accuracy)):
        if floor is not None and (sentence := below(report, names, floor)):
            found.append(sentence)
    return found


def drifts(report: Mapping[str, Any], expected: Expectation) -> list[str]:
    """What differs from the expectation, a sentence each; empty when all is as expected."""
    found = [
        f"{path} is {_at(report, path)}, expected {text}."
        for path, text in expected.identity.items()
        if _at(report, path) != text
    ]
    figures = _figures(report)
    for key, (wanted, tolerance) in expected.figures.items():
        have, note = figures.get(key, (None, None))
        if key not in figures:
            found.append(f"{key} is not in this report, expected {wanted}.")
        elif have is None and wanted is not None:
            found.append(f"{key} is undefined ({note}), expected {wanted!r}.")
        elif have is not None and wanted is None:
            found.append(f"{key} is {have!r}, expected it to be undefined.")
        elif have is not None and wanted is not None and abs(have - wanted) > tolerance:
            found.append(
                f"{key} is {have!r}, expected {wanted!r} (off by {have - wanted:+.6g}, tolerance "
                f"{tolerance:g})."
            )
    return found


def below(report: Mapping[str, Any], names: Sequence[str], floor: float) -> str | None:
    """Why a floor is not reached by the first of the names that a report has; None when it is."""
    figures = _figures(report)
    name = next((name for name in names if name in figures), None)
    if name is None:
        return f"{names[0]} is not among this report's figures, at least {floor:g} was asked for."
    value, note = figures[name]
    if value is None:
        return f"{name} is undefined ({note}), at least {floor:g} was asked for."
    return f"{name} is {value:.6f}, at least {floor:g} was asked for." if value < floor else None


def _figures(report: Mapping[str, Any]) -> dict[str, tuple[float | None, str | None]]:
    """Every number of a report under its key, with the reason where it is undefined."""
    groups = {**_dotted(report["per_kind"]), **report["figures"]}
    counts = {f"counts.{name}": (value, None) for name, value in report["counts"].items()}
    return {key: (figure["value"], figure["note"]) for key, figure in groups.items()} | counts


def _at(report: Mapping[str, Any], dotted: str) -> str:
    value: Any = report
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return str(value)
