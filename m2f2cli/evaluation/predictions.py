"""Files of answers, told apart by their content. Standard library only.

``detections``: records of ``m2f2 detect`` and ``m2f2 explain``. ``judgements`` and
``explanations``: the published answer files, ``{"image", "prompt", "text"}`` and ``{"key",
"image", "prompt", "text"}`` a line. ``frames``: the published CSV
``image_id,ground_truth,prediction``, whose labels and probabilities speak of real.
``docs/metrics.md`` has an example of each.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2f2cli.data.conversations import plain
from m2f2cli.errors import InputError
from m2f2cli.files import parse_json
from m2f2cli.records import SCHEMA_VERSION, STATUSES, VERDICTS, read_text

OTHERS = "was made by another model, or with another threshold, than the first"
CSV_HEADER = ["image_id", "ground_truth", "prediction"]
# Of the columns of ``m2f2 detect``'s tables, those that every version writes and that are read.
_OF_A_TABLE = ("path", "kind", "status", "fake_probability", "threshold", "schema_version")


@dataclass(frozen=True)
class Prediction:
    """One row of a file of answers."""

    name: str  # the picture, or the key of the question, as the file spells it
    fake_probability: float | None = None  # in [0, 1], or None
    verdict: str | None = None  # real, fake, uncertain or None
    answer: str | None = None  # the text, as the file has it
    question: str | None = None  # the prompt
    status: str = "ok"  # a key of records.STATUSES
    in_domain: bool | None = None  # as in records.Detection
    forgery: str | None = None  # as there

    def same_answer(self, other: Prediction) -> bool:
        """Whether two rows say the same; marks of the tokeniser do not count."""
        texts = [plain(row.answer) if row.answer is not None else None for row in (self, other)]
        mine, others = ((r.fake_probability, r.verdict, r.status) for r in (self, other))
        return mine == others and texts[0] == texts[1]


@dataclass(frozen=True)
class Predictions:
    """A file of answers."""

    path: Path  # the file
    layout: str  # detections, judgements, explanations or frames
    rows: tuple[Prediction, ...]  # every row in the file's order, repeated ones too
    threshold: float | None = None  # of the model that made them; None when the file does not say
    model: str | None = None  # its name; None as above
    model_fingerprint: str | None = None  # sha256:…; None as above
    # Layout frames: the file's own truth, name to 0 real or 1 fake
    labels: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what to know about how the file was read

    @property
    def task(self) -> str:
        """What they answer: a task of ``scored.TASKS``."""
        tasks = {"judgements": "judgement", "explanations": "explanation"}
        return tasks.get(self.layout, "scores")


class BadRow(ValueError):
    """A row is not what its file's layout asks for; the message says what is wrong."""


def read_predictions(path: Path) -> Predictions:
    """Read a file of answers.

    Raises:
        InputError: It is missing, empty, no text, of no known layout, or a row is broken; the
            message names the line.
    """
    text = read_text(path)
    if text.lstrip().startswith("{"):
        return _read_lines(path, text)
    header = [word.strip() for word in text.partition("\n")[0].split(",")]
    if header == CSV_HEADER:
        return _read_frames(path, text)
    if set(_OF_A_TABLE) <= set(header):
        return _read_table(path, text, header)
    raise InputError(
        f"'{path}' is no file of answers that m2f2 knows.",
        hint="It reads the records of 'm2f2 detect --output' (.jsonl, .csv), the published .jsonl "
        f"answers and the published CSV with the header '{','.join(CSV_HEADER)}'.",
    )


def json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their line numbers; blank lines are passed over.

    Raises:
        InputError: A line is no JSON object; that it is cut is said where it is the last one.
    """
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, strict=True)
        except ValueError as error:
            fault = "is cut off" if number == len(lines) else f"is no JSON ({error})"
            raise InputError(
                f"Line {number} of '{path}' {fault}.",
                "truncated" if number == len(lines) else "unreadable",
                "Remove that line, or make the file again.",
            ) from error
        if not isinstance(row, dict):
            raise bad_line(path, number, "is no JSON object")
        yield number, row


def bad_line(path: Path, number: int, fault: str) -> InputError:
    """The sentence for a broken line."""
    return InputError(f"Line {number} of '{path}' {fault}.", hint="Correct or remove that line.")


def value_of(row: Mapping[str, Any], key: str, kind: type, *, required: bool = False) -> Any:
    """One value of a row, None where it is absent or null.

    Raises:
        BadRow: It is of another type, or required and absent.
    """
    value = row.get(key)
    if value is None:
        if required:
            raise BadRow(f"lacks '{key}'")
        return None
    if not isinstance(value, kind):
        raise BadRow(f"has {value!r} for '{key}'")
    return value


def probability(value: object, key: str) -> float:
    """Check a probability.

    Raises:
        BadRow: It is no number in [0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise BadRow(f"has {value!r} for '{key}', which is no probability in [0, 1]")
    return float(value)


def _read_lines(path: Path, text: str) -> Predictions:
    notes: tuple[str, ...] = ()
    body, newline, last = text.rpartition("\n")
    # Only our own records are written line by line by runs that may be killed and resumed.
    if newline and last.lstrip().startswith('{"schema_version"') and not _is_json(last):
        text = body + newline
        notes = (f"The last line of '{path}' is cut off and was left out.",)
    layout, rows = "", []
    made_by: dict[str, Any] = {}
    for number, row in json_lines(path, text):
        layout = layout or _layout(row)
        if layout not in _READERS:
            raise bad_line(path, number, "is of no known layout")
        try:
            rows.append(_READERS[layout](row))
            made_by = made_by or _made_by(row)
            if layout == "detections" and made_by != _made_by(row):
                raise BadRow(OTHERS)
        except BadRow as error:
            raise bad_line(path, number, str(error)) from error
    return Predictions(path, layout, tuple(rows), notes=notes, **made_by)


def _is_json(line: str) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def _layout(row: Mapping[str, Any]) -> str:
    if "schema_version" in row:
        return "detections"
    if "key" in row:
        return "explanations"
    return "judgements" if "image" in row else ""


def _made_by(row: Mapping[str, Any]) -> dict[str, Any]:
    if "schema_version" not in row:
        return {}
    threshold = row.get("threshold")
    return {
        "threshold": None if threshold is None else probability(threshold, "threshold"),
        "model": value_of(row, "model", str),
        "model_fingerprint": value_of(row, "model_fingerprint", str),
    }


def _detection(row: Mapping[str, Any]) -> Prediction:
    if row.get("schema_version") != SCHEMA_VERSION:
        raise BadRow(f"has the schema version {row.get('schema_version')!r}, not {SCHEMA_VERSION}")
    if row.get("kind") not in ("image", "video"):
        raise BadRow(f"has {row.get('kind')!r} for 'kind', which is no record of 'm2f2 detect'")
    score = row.get("fake_probability")
    verdict, status = value_of(row, "verdict", str), value_of(row, "status", str, required=True)
    if verdict not in (None, *VERDICTS):
        raise BadRow(f"has {verdict!r} for 'verdict'")
    if status not in STATUSES:
        raise BadRow(f"has {status!r} for 'status'")
    if status == "ok" and score is None:
        raise BadRow("lacks 'fake_probability'")
    return Prediction(
        name=value_of(row, "path", str, required=True),
        fake_probability=None if score is None else probability(score, "fake_probability"),
        verdict=verdict,
        status=status,
        in_domain=value_of(row, "in_domain", bool),
        forgery=value_of(row, "forgery", str),
    )


def _text(row: Mapping[str, Any], key: str) -> Prediction:
    return Prediction(
        name=value_of(row, key, str, required=True),
        answer=value_of(row, "text", str, required=True),
        question=value_of(row, "prompt", str),
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], Prediction]] = {
    "detections": _detection,
    "judgements": lambda row: _text(row, "image"),
    "explanations": lambda row: _text(row, "key"),
}


def _read_frames(path: Path, text: str) -> Predictions:
    """The published CSV: ``ground_truth`` 1 is real, ``prediction`` is the probability of real."""
    rows = []
    labels: dict[str, int] = {}
    for line, row in csv_rows(path, text):
        if len(row) != len(CSV_HEADER):
            raise bad_line(path, line, f"has {len(row)} columns, not {len(CSV_HEADER)}")
        name, truth, score = (word.strip() for word in row)
        if truth not in ("0", "1"):
            raise bad_line(path, line, f"has {truth!r} for 'ground_truth', not 0 or 1")
        label = 1 - int(truth)
        if labels.setdefault(name, label) != label:
            raise bad_line(path, line, f"gives '{name}' another label than before")
        real = _float(score)
        if not 0 <= real <= 1:
            fault = f"has {score!r} for 'prediction', which is no probability in [0, 1]"
            raise bad_line(path, line, fault)
        rows.append(Prediction(name, fake_probability=1 - real))
    if not rows:
        raise InputError(f"'{path}' holds no rows.", "empty")
    return Predictions(path, "frames", tuple(rows), labels=labels)


def _read_table(path: Path, text: str, header: Sequence[str]) -> Predictions:
    """The table that ``m2f2 detect --output FILE.csv`` writes: the values of its records."""
    rows: list[Prediction] = []
    made_by: dict[str, Any] = {}
    for line, cells in csv_rows(path, text):
        if len(cells) != len(header):
            raise bad_line(path, line, f"has {len(cells)} columns, not {len(header)}")
        found: dict[str, Any] = {k: v or None for k, v in zip(header, cells, strict=True)}
        for key in ("fake_probability", "threshold", "schema_version"):
            if found[key] is not None:
                found[key] = _float(found[key])
        domain = found.get("in_domain")
        found["in_domain"] = {"True": True, "False": False}.get(domain or "", domain)
        try:
            rows.append(_detection(found))
            made_by = made_by or _made_by(found)
            if made_by != _made_by(found):
                raise BadRow(OTHERS)
        except BadRow as error:
            raise bad_line(path, line, str(error)) from error
    if not rows:
        raise InputError(f"'{path}' holds no rows.", "empty")
    return Predictions(path, "detections", tuple(rows), **made_by)


def csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows below the heading of a CSV file with their line numbers, without empty ones.

    Raises:
        InputError: A line is no CSV, or a field is longer than a line of text can be.
    """
    reader = csv.reader(io.StringIO(text))
    try:
        next(reader)
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise bad_line(path, reader.line_num, f"is no line of a CSV file: {error}") from error


def _float(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan
