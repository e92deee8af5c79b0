"""The rows of a DD-VQA question file, and of the published files of answers. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from m2f2cli.errors import InputError
from m2f2cli.records import SCHEMA_VERSION, ExplainSettings, plain


class Row(NamedTuple):
    """One question of a file.

    Attributes:
        key: Its name, ``<picture>_<number>``; in a file of judgements the picture's path.
        picture: File name without suffix.
        question: As the file has it; None asks for the judgement.
    """

    key: str
    picture: str
    question: str | None


@dataclass(frozen=True)
class AnswerRow:
    """One answer, or why there is none.

    Attributes:
        path: The question's key, or for a judgement the picture.
        image: The picture, as the published files spell it.
        status: A key of ``records.STATUSES``; only answers (``ok``) are written to a file.
        settings: Of the run.
        message: Why there is no answer.
        prompt: The whole prompt.
        text: The answer between the tokeniser's marks.
        fake_probability: The detector's.
        verdict: The detector's.
        told: What the question says of the face, ``real`` or ``fake``; None when nothing.
    """

    path: str
    image: str
    status: str
    settings: ExplainSettings
    message: str | None = None
    prompt: str | None = None
    text: str | None = None
    fake_probability: float | None = None
    verdict: str | None = None
    told: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The published row; what is ours is in ``metadata``."""
        key = {} if self.path == self.image else {"key": self.path}
        about = {
            "schema_version": SCHEMA_VERSION,
            "status": self.status,
            "message": self.message,
            "fake_probability": self.fake_probability,
            "verdict": self.verdict,
            "told": self.told,
            **plain(self.settings),
        }
        words = {"image": self.image, "prompt": self.prompt, "text": self.text}
        return {**key, **words, "metadata": about}


def read_questions(file: Path) -> tuple[list[Row], str]:
    """Read a file of questions: one ``{"<picture>_<number>": {"question": …}}`` a line.

    Returns:
        The questions in order, and the ``sha256:…`` of the file.

    Raises:
        InputError: It is missing, empty or no text, or a row is broken; the line is named.
    """
    try:
        data = file.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise InputError(f"There is no file '{file}'.", "missing", "Check --dataset.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"'{file}' is not a text file (UTF-8).") from error
    except OSError as error:
        raise InputError(f"'{file}' cannot be read: {error.strerror}.") from error
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _row(line)
        if row is None or rows.setdefault(row.key, row) != row:
            fault = "is no question" if row is None else f"asks another '{row.key}' than before"
            raise InputError(
                f"Line {number} of '{file}' {fault}.",
                hint='A line is like {"5_012_0": {"question": "…", "answer": ["…"]}}.',
            )
    if not rows:
        raise InputError(f"'{file}' is empty.", "empty")
    return list(rows.values()), f"sha256:{hashlib.sha256(data).hexdigest()}"


def _row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or len(row) != 1:
        return None
    key, entry = next(iter(row.items()))
    picture = re.fullmatch(r"([^/\\]+)_\d+", key)
    question = entry.get("question") if isinstance(entry, dict) else None
    if picture is None or not isinstance(question, str) or not question.strip():
        return None
    return Row(key, picture[1], question)
